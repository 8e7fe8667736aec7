"""The machine: backend, platform and devices, set up before Keras is imported and checked.

This is the one module that touches process-wide state (environment variables and JAX's
configuration). A machine that is not what the spec asks for ends the job here, before any
file is written.
"""

import contextlib
import importlib.metadata
import os
import platform as host
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import JobError, SetupError
from job.machine.accelerators import Machine
from job.results import EnvironmentInfo
from job.runtime import logs
from job.spec.schema import Runtime, Spec
from job.storage.cache_folder import cache_folder
from job.storage.locations import open_store

if TYPE_CHECKING:
    from jax import Device
    from jax.sharding import Mesh

    from job.storage.base import Store


PACKAGES = ("job", "jax", "jaxlib", "keras", "keras-hub", "pyarrow", "numpy", "libtpu")


_WAY_OUT = {
    "tpu": "on a TPU VM install the `tpu` extra and give the container --privileged --net=host",
    "gpu": "install the `cuda` extra and a driver that matches it",
    "cpu": "set JAX_PLATFORMS=cpu",
}


_DEV = Path("/dev")


class CompileClock:
    """Seconds this process spent in the compiler, by JAX's own events."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def listen(self) -> None:
        """Count from now on."""
        import jax

        def on_event(event: str, duration_secs: float, **_: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self.seconds += duration_secs

        jax.monitoring.register_event_duration_secs_listener(on_event)


COMPILE_CLOCK = CompileClock()


def set_environment() -> None:
    """Choose the JAX backend for Keras; must come before anything imports Keras.

    Raises:
        EnvironmentProblem: Keras is in use with another backend already.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives back what it frees
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    keras = sys.modules.get("keras")
    if keras is not None:
        _check_backend(keras.config.backend())


def use_cpu() -> None:
    """Keep this process off the accelerators: for work on files, which need not fit on one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    set_environment()


def _check_backend(found: str) -> None:
    if found != "jax":
        raise SetupError(
            f"Keras runs on the {found} backend, and this job needs jax: unset KERAS_BACKEND "
            "and remove `backend` from ~/.keras/keras.json"
        )


def start(spec: Spec) -> EnvironmentInfo:
    """Bring up JAX, check the machine against the spec, and say what it is.

    Raises:
        EnvironmentProblem: another platform or device count than the spec asks for, or a
            batch that these devices cannot share.
    """
    set_environment()
    try:
        import jax

        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "there is no such platform"
        raise SetupError(
            f"JAX found no usable device (JAX_PLATFORMS={wanted!r}): {reason}{_looked_for(wanted)}"
        ) from error
    found = _platform(devices[0].platform)
    check_devices(spec.runtime, found, len(devices), devices[0].device_kind)
    check_batch(spec, data_parallel(spec.runtime, len(devices)))
    _configure_cache(spec.runtime)
    COMPILE_CLOCK.listen()
    return EnvironmentInfo(
        platform=found,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        processes=jax.process_count(),
        python=host.python_version(),
        packages=_versions(),
        git_commit=_git_commit(),
        image=os.environ.get("JOB_IMAGE") or None,
    )


def _looked_for(platforms: str) -> str:
    """Where the chips of a TPU were looked for, and what to do where there are none."""
    if not platforms.startswith("tpu"):
        return ""
    from jax._src.hardware_utils import num_available_tpu_chips_and_device_id

    chips = num_available_tpu_chips_and_device_id()[0]  # type: ignore[no-untyped-call]
    files = sorted(str(path) for path in (*_DEV.glob("accel*"), *_DEV.glob("vfio/[0-9]*")))
    return (
        f"; looked for TPU chips in /sys/bus/pci/devices ({chips} found) and for /dev/accel* and "
        f"/dev/vfio/* ({', '.join(files) or 'none'} found); {_WAY_OUT['tpu']}, "
        "or set JAX_PLATFORMS=cpu"
    )


def start_freely() -> None:
    """Bring up JAX on whatever devices there are: for work that asks for no certain machine."""
    set_environment()
    _configure_cache(Runtime())


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


def check_devices(wanted: Runtime, platform: str, devices: int, kind: str) -> None:
    """Raise unless the platform and the number of devices are what the spec asks for."""
    found = f"found {devices} {platform} device{'s' if devices != 1 else ''} ({kind})"
    if wanted.platform not in ("any", platform):
        raise SetupError(
            f"runtime.platform is {wanted.platform}, but JAX {found}; {_WAY_OUT[wanted.platform]}, "
            "or run with --set runtime.platform=any --set runtime.devices=null"
        )
    if wanted.devices is not None and wanted.devices != devices:
        raise SetupError(
            f"runtime.devices is {wanted.devices}, but JAX {found}; use a machine with "
            f"{wanted.devices}, or run with --set runtime.devices={devices}"
        )
    mesh = wanted.mesh
    if devices % mesh.model and mesh.data == "auto":
        raise SetupError(
            f"runtime.mesh.model is {mesh.model}, but JAX {found}, which it does not divide; "
            "set runtime.mesh.data too, or another runtime.mesh.model"
        )
    if data_parallel(wanted, devices) * mesh.model > devices:
        beside = f" times runtime.mesh.model {mesh.model}" if mesh.model > 1 else ""
        raise SetupError(
            f"runtime.mesh.data is {mesh.data}{beside}, but JAX {found}; "
            f"run with --set runtime.mesh.data={max(1, devices // mesh.model)}"
        )


def data_parallel(wanted: Runtime, devices: int) -> int:
    """Parts that the batch is split into."""
    mesh = wanted.mesh
    return max(1, devices // mesh.model) if mesh.data == "auto" else mesh.data


def check_batch(spec: Spec, devices: int) -> None:
    """Raise unless a step's rows can be shared out evenly."""
    batch, micro = spec.train.batch_size, spec.train.micro_batch
    unit = devices * (1 if micro == "auto" else micro)
    if batch % unit:
        detail = f"{devices} device{'s' if devices != 1 else ''}"
        if micro != "auto":
            detail += f" times train.micro_batch {micro}"
        raise SetupError(
            f"train.batch_size {batch} cannot be shared by {detail}: use a multiple of {unit}, "
            "or fewer devices with runtime.mesh.data"
        )


def make_mesh(wanted: Runtime, devices: "Sequence[Device] | None" = None) -> "Mesh":
    """The devices (JAX's, where none are given) as a mesh with the axes `data` and `model`."""
    import jax
    from jax.sharding import AxisType

    devices = devices or jax.devices()
    shape = (data_parallel(wanted, len(devices)), wanted.mesh.model)
    return jax.make_mesh(
        shape,
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: shape[0] * shape[1]],
    )


def start_compiler(wanted: Machine) -> None:
    """Prepare this process to compile for a TPU that is not there; before JAX is imported."""
    set_environment()
    os.environ["JAX_PLATFORMS"] = "cpu"  # everything but the compiler runs here
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for devices, and none is used
    os.environ["TPU_ACCELERATOR_TYPE"] = wanted.accelerator_type or ""
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def compiling_for(wanted: Machine) -> "Iterator[list[Device]]":
    """The devices of a TPU slice, which programs can be compiled for but not run on.

    Within this block `jax.devices` gives them too, so that what is traced is what a process on
    such a machine would trace: KerasHub and Keras ask for the platform while tracing.

    Raises:
        EnvironmentProblem: the TPU compiler is not installed.
    """
    start_compiler(wanted)
    import jax
    from jax.experimental import topologies

    # Without it the two cores of a v4 chip count as devices of their own.
    options = {"chip_config_name": "megacore"} if wanted.accelerator.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=wanted.topology_name or "", **options
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise SetupError(
            "--compile needs the TPU compiler: run `uv run --extra tpu job plan ...`, or install "
            f"job[tpu] ({first})"
        ) from error
    devices, ordinary = list(found.devices), jax.devices
    jax.devices = lambda *given: ordinary(*given) if given else devices
    try:
        yield devices
    finally:
        jax.devices = ordinary


def import_keras() -> None:
    """Import Keras and check that it really runs on JAX."""
    set_environment()
    import keras

    _check_backend(keras.config.backend())


def _configure_cache(wanted: Runtime) -> None:
    import jax

    if wanted.compilation_cache is None:
        return
    folder = wanted.compilation_cache
    if folder == "auto":
        folder = str(cache_folder("xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # type: ignore[no-untyped-call]
    if folder.startswith("gs://"):
        use_store_cache(open_store(folder))
    else:
        jax.config.update("jax_compilation_cache_dir", folder)  # type: ignore[no-untyped-call]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the code: the image's label, or that of the checkout it is run from."""
    if commit := os.environ.get("JOB_GIT_COMMIT"):
        return commit
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def use_store_cache(store: "Store") -> None:
    """Keep compiled programs in the store; must come before anything is compiled."""
    import jax
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    class StoreCache(CacheInterface):
        """Entries by JAX's own keys, which hold versions, devices and options."""

        _path = Path(store.uri)

        def get(self, key: str) -> bytes | None:
            try:
                return store.read(key)
            except JobError as error:
                logs.get().warning("the compilation cache cannot be read", error=str(error))
                return None

        def put(self, key: str, value: bytes) -> None:
            try:
                if store.size(key) is None:
                    store.write(key, value)
            except JobError as error:
                logs.get().warning("the compilation cache cannot be written", error=str(error))

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", store.uri)  # type: ignore[no-untyped-call]
    compilation_cache._cache = StoreCache()
