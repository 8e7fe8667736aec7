"""A machine that is not what the spec asks for is refused with what was found and a way out."""

from pathlib import Path

import pytest

from job.errors import SetupError
from job.machine.devices import check_batch, check_devices, data_parallel
from job.spec.schema import Mesh, Runtime, Spec
from job.storage.locations import cache_folder


def spec(**train: object) -> Spec:
    return Spec.model_validate({
        "name": "t",
        "model": {"preset": "tiny"},
        "data": {"dataset": "samples", "prompt": "{input}", "response": "{output}"},
        "train": train,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("runtime", "platform", "devices"),
    [
        (Runtime(), "cpu", 1),
        (Runtime(platform="tpu", devices=8), "tpu", 8),
        (Runtime(platform="gpu"), "gpu", 3),
        (Runtime(mesh=Mesh(data=4)), "tpu", 8),
    ],
)
def test_a_matching_environment_is_accepted(runtime: Runtime, platform: str, devices: int) -> None:
    check_devices(runtime, platform, devices, "kind")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (Runtime(platform="tpu"), r"platform is tpu, but JAX has 2 cpu devices .*tpu. extra"),
        (Runtime(platform="gpu"), r"platform is gpu, but JAX has 2 cpu devices .*cuda. extra"),
        (Runtime(devices=8), r"devices is 8, but JAX has 2 .*--set runtime.devices=2"),
        (Runtime(mesh=Mesh(data=3)), r"mesh.data is 3, .*--set runtime.mesh.data=2"),
    ],
)
def test_an_environment_that_does_not_match_is_refused(runtime: Runtime, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        check_devices(runtime, "cpu", 2, "kind")
    assert caught.value.exit_code == 3


def test_the_batch_is_split_over_all_devices_by_default() -> None:
    assert data_parallel(Runtime(), 8) == 8
    assert data_parallel(Runtime(mesh=Mesh(data=2)), 8) == 2


@pytest.mark.parametrize(
    ("train", "devices", "unit"),
    [
        ({"batch_size": 6}, 4, 4),
        ({"batch_size": 8, "micro_batch": 3}, 1, 3),
        ({"batch_size": 8, "micro_batch": 2}, 8, 16),
    ],
)
def test_a_batch_that_does_not_divide_names_the_unit(
    train: dict[str, int], devices: int, unit: int
) -> None:
    with pytest.raises(SetupError, match=f"use a multiple of {unit}"):
        check_batch(spec(**train), devices)
    check_batch(spec(**{**train, "batch_size": unit * 2}), devices)


def test_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_CACHE", "/somewhere")
    assert cache_folder("xla") == Path("/somewhere/xla")
    monkeypatch.delenv("JOB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder("xla") == Path("/caches/job/xla")
