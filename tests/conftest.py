"""What all tests share: a cache of their own, Keras on JAX, eight virtual devices, a tiny model.

The cache belongs to the session, so that no test sees files of another checkout, and a program
compiled by one test is there for the next, in every worker.
"""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import settings

if TYPE_CHECKING:
    from job.model.language_model import LanguageModel
    from tests.services.bucket import Bucket

_cache = os.environ.get("JOB_TESTS_CACHE", "")
if not _cache:  # the first process; the workers that it starts inherit the variable
    _cache = os.environ["JOB_TESTS_CACHE"] = tempfile.mkdtemp(prefix="job-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JOB_CACHE"] = _cache
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("OPENROUTER_API_KEY", None)
os.environ.pop("HF_TOKEN", None)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Without bytecode an import of Keras takes three times as long, in every process that tests start.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = f"{sys.prefix}/bytecode"

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONG = (
    "end_to_end",
    "test_blockwise_step",
    "test_trainer",
    "test_step",
    "test_generation",
    "test_language_model",
    "test_shar",
)
"""Files that take long, the longest first."""


MakeModel = Callable[..., "LanguageModel"]


@pytest.fixture(autouse=True)
def default_log() -> Iterator[None]:
    """A command that a test ran has set up the log, on a stream that is closed by now."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator["Bucket"]:
    """The stand-in for Cloud Storage that this process talks to, with a bucket `runs`."""
    from tests.services.bucket import Bucket

    with Bucket("runs") as service:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", service.url)
        yield service


@pytest.fixture(scope="session")
def make_model(two_blocks: str) -> MakeModel:
    """Loads a model on the first virtual devices: its batch over `devices` times `split`.

    By default it is the tiny model with two of its six blocks, which compiles three times as fast;
    the preset `tiny` has the global block. The same arguments give the same model, which tests
    leave as it is.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from job.model.load import load_model
    from job.spec.schema import Lora, Model

    @functools.cache
    def make(
        *,
        preset: str = two_blocks,
        rank: int = 4,
        alpha: float | None = None,
        targets: tuple[str, ...] = ("query", "value"),
        devices: int = 1,
        split: int = 1,
    ) -> "LanguageModel":
        lora = Lora(rank=rank, alpha=alpha, targets=list(targets))
        template = "gemma" if preset == two_blocks else "auto"
        model = Model(preset=preset, dtype="float32", chat_template=template, lora=lora)
        mesh = np.array(jax.devices()[: devices * split]).reshape(devices, split)
        return load_model(model, 0, Mesh(mesh, ("data", "model")))

    return make


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> "LanguageModel":
    """Two blocks of the tiny model on one device, LoRA of rank 4 on query and value."""
    return make_model()


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model like the tiny one, with two of its six blocks."""
    from job.model.tiny import SHAPE, build_preset

    folder = tmp_path_factory.mktemp("preset")
    build_preset(folder, SHAPE | {"num_layers": 2})
    return str(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Set up JAX before anything asks it for its devices, not for the processes of tests.

    In the default run it compiles quickly: those tests compile much and compute little. They
    also make many objects that live long, which the garbage collector need not visit so often.
    """
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if config.getoption("numprocesses", None):
        return  # this process only starts those that run tests

    gc.set_threshold(100_000, 20, 100)
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", f"{_cache}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that two workers end at about the same time."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), 99))
