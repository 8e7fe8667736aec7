"""JAX's platform and devices: checked against the spec, and made a mesh.

An environment that does not match the spec ends the job here, before any file is written.
"""

import contextlib
import importlib.metadata
import os
import platform as host
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import JobError, SetupError
from job.machine.accelerators import Machine
from job.results import EnvironmentInfo
from job.runtime import logs
from job.spec.schema import Runtime, Spec
from job.storage.locations import cache_folder, open_store

if TYPE_CHECKING:
    from jax import Device
    from jax.sharding import Mesh

    from job.storage.base import Store


PACKAGES = ("job", "jax", "jaxlib", "keras", "keras-hub", "pyarrow", "numpy", "libtpu")

_HINTS = {
    "tpu": "on a TPU VM install the `tpu` extra; docker/README.md has the flags of the container",
    "gpu": "install the `cuda` extra and a driver that matches it",
    "cpu": "set JAX_PLATFORMS=cpu",
}

_DEV = Path("/dev")


class CompileClock:
    """Seconds this process spent compiling, from JAX's own events."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def listen(self) -> None:
        """Start counting."""
        import jax

        def on_event(event: str, duration_secs: float, **_: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self.seconds += duration_secs

        jax.monitoring.register_event_duration_secs_listener(on_event)


COMPILE_CLOCK = CompileClock()


def start(spec: Spec) -> EnvironmentInfo:
    """Start JAX, check the environment against the spec, and describe it.

    Raises:
        SetupError: the platform or the number of devices is not the spec's, or the batch cannot be
            divided over these devices.
    """
    try:
        import jax

        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "there is no such platform"
        raise SetupError(
            f"JAX has no usable device (JAX_PLATFORMS={platforms!r}): {reason}"
            f"{_tpu_details(platforms)}"
        ) from error
    platform = devices[0].platform
    check_devices(spec.runtime, platform, len(devices), devices[0].device_kind)
    check_batch(spec, data_parallel(spec.runtime, len(devices)))
    configure_cache(spec.runtime)
    COMPILE_CLOCK.listen()
    return EnvironmentInfo(
        platform=platform,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        processes=jax.process_count(),
        python=host.python_version(),
        packages=_versions(),
        git_commit=_git_commit(),
        image=os.environ.get("JOB_IMAGE") or None,
    )


def _tpu_details(platforms: str) -> str:
    """Describe the TPU chips and device files of this host, and what to do without any."""
    if not platforms.startswith("tpu"):
        return ""
    from jax._src.hardware_utils import num_available_tpu_chips_and_device_id

    chips = num_available_tpu_chips_and_device_id()[0]  # type: ignore[no-untyped-call]
    files = sorted(str(path) for path in (*_DEV.glob("accel*"), *_DEV.glob("vfio/[0-9]*")))
    return (
        f"; TPU chips in /sys/bus/pci/devices: {chips}; files /dev/accel* and /dev/vfio/*: "
        f"{', '.join(files) or 'none'}; {_HINTS['tpu']}, or set JAX_PLATFORMS=cpu"
    )


def check_devices(runtime: Runtime, platform: str, devices: int, kind: str) -> None:
    """Raise SetupError if the platform or the number of devices is not the spec's."""
    actual = f"has {devices} {platform} device{'s' if devices != 1 else ''} ({kind})"
    if runtime.platform not in ("any", platform):
        raise SetupError(
            f"runtime.platform is {runtime.platform}, but JAX {actual}; "
            f"{_HINTS[runtime.platform]}, "
            "or run with --set runtime.platform=any --set runtime.devices=null"
        )
    if runtime.devices is not None and runtime.devices != devices:
        raise SetupError(
            f"runtime.devices is {runtime.devices}, but JAX {actual}; use a machine with "
            f"{runtime.devices}, or run with --set runtime.devices={devices}"
        )
    mesh = runtime.mesh
    if devices % mesh.model and mesh.data == "auto":
        raise SetupError(
            f"runtime.mesh.model is {mesh.model}, which does not divide the number of devices: "
            f"JAX {actual}; set runtime.mesh.data too, or another runtime.mesh.model"
        )
    if data_parallel(runtime, devices) * mesh.model > devices:
        model = f" times runtime.mesh.model {mesh.model}" if mesh.model > 1 else ""
        raise SetupError(
            f"runtime.mesh.data is {mesh.data}{model}, but JAX {actual}; "
            f"run with --set runtime.mesh.data={max(1, devices // mesh.model)}"
        )


def data_parallel(runtime: Runtime, devices: int) -> int:
    """Return the data-parallel size of the mesh, the parts a batch is split into."""
    mesh = runtime.mesh
    return max(1, devices // mesh.model) if mesh.data == "auto" else mesh.data


def check_batch(spec: Spec, devices: int) -> None:
    """Raise SetupError if the rows of a step cannot be divided evenly over the devices."""
    batch, micro = spec.train.batch_size, spec.train.micro_batch
    unit = devices * (1 if micro == "auto" else micro)
    if batch % unit:
        detail = f"{devices} device{'s' if devices != 1 else ''}"
        if micro != "auto":
            detail += f" times train.micro_batch {micro}"
        raise SetupError(
            f"train.batch_size {batch} cannot be divided over {detail}: use a multiple of {unit}, "
            "or fewer devices with runtime.mesh.data"
        )


def make_mesh(runtime: Runtime, devices: "Sequence[Device] | None" = None) -> "Mesh":
    """Return a mesh with the axes `data` and `model`, of all of JAX's devices by default."""
    import jax
    from jax.sharding import AxisType

    devices = devices or jax.devices()
    shape = (data_parallel(runtime, len(devices)), runtime.mesh.model)
    return jax.make_mesh(
        shape,
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: shape[0] * shape[1]],
    )


@contextlib.contextmanager
def compiling_for(machine: Machine) -> "Iterator[list[Device]]":
    """Yield the devices of a TPU slice, for which programs can be compiled but not run.

    Within this block `jax.devices` returns them too, so that programs are traced as on such a
    machine: Keras and KerasHub read the platform while tracing.

    Raises:
        SetupError: the TPU compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # only the compiler needs the TPU's platform
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock protects devices; none is used
    os.environ["TPU_ACCELERATOR_TYPE"] = machine.accelerator_type or ""
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    import jax
    from jax.experimental import topologies

    # Without it the two cores of a v4 chip count as separate devices.
    options = {"chip_config_name": "megacore"} if machine.accelerator.name == "v4" else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.topology_name or "", **options
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise SetupError(
            "--compile needs the TPU compiler: run `uv run --extra tpu job plan ...`, or install "
            f"job[tpu] ({first})"
        ) from error
    devices, original = list(topology.devices), jax.devices
    jax.devices = lambda *backend: original(*backend) if backend else devices
    try:
        yield devices
    finally:
        jax.devices = original


def configure_cache(runtime: Runtime) -> None:
    """Turn on JAX's persistent compilation cache; call this before anything is compiled."""
    import jax

    if runtime.compilation_cache is None:
        return
    # Without the cache, programs are compiled again: no reason to print beside the log.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    folder = runtime.compilation_cache
    if folder == "auto":
        folder = str(cache_folder("xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # type: ignore[no-untyped-call]
    if folder.startswith("gs://"):
        _use_store_cache(open_store(folder))
    else:
        jax.config.update("jax_compilation_cache_dir", folder)  # type: ignore[no-untyped-call]


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_commit() -> str | None:
    """Return the commit of the code, from the image's label or the git checkout."""
    if commit := os.environ.get("JOB_GIT_COMMIT"):
        return commit
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        output = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip()


def _use_store_cache(store: "Store") -> None:
    """Make the store JAX's persistent compilation cache."""
    import jax
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    class StoreCache(CacheInterface):
        """Compiled programs by JAX's keys, which cover versions, devices and options."""

        _path = Path(store.uri)

        def get(self, key: str) -> bytes | None:
            try:
                return store.read(key)
            except JobError as error:
                logs.get().warning("cannot read compilation cache", error=str(error))
                return None

        def put(self, key: str, value: bytes) -> None:
            try:
                if store.stat(key) is None:
                    store.write(key, value)
            except JobError as error:
                logs.get().warning("cannot write compilation cache", error=str(error))

    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", store.uri)  # type: ignore[no-untyped-call]
    compilation_cache._cache = StoreCache()
