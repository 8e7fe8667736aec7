"""The registry of accelerators: chips, memory, peaks, topologies, cloud names, quotas, prices.

Training, `job plan` and the scripts that start machines read this table. Names of machines are
gcloud's without `litepod`: `v5e-8` has 8 chips, but v4 and v5p count TensorCores, two per chip
(`v5p-8` has 4 chips). GPUs are counted one by one.

Peaks, memory and links are from https://cloud.google.com/tpu/docs/system-architecture and NVIDIA's
data sheets (dense, without sparsity); `hbm_bytes` of a TPU is what its compiler gives to programs.
Prices are public list prices of the cheapest region of the United States, in USD.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from job.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Price:
    """List prices of one chip in USD per hour, and their date; None: no such price."""

    on_demand: float | None
    spot: float | None
    date: str
    spot_by_region: Mapping[str, float] = field(default_factory=dict)
    """Spot prices that differ from `spot`, which is the cheapest region's."""


@dataclass(frozen=True)
class Quota:
    """Names of the quotas a machine counts against, on demand and spot."""

    on_demand: str
    spot: str


@dataclass(frozen=True)
class Accelerator:
    """One kind of chip, and the machines that have it."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    device_kinds: tuple[str, ...]
    """JAX's names for a chip (`device.device_kind`)."""
    hbm_bytes: int | None = None
    """Memory of a chip that a program may use."""
    peak_flops: float | None = None
    """Dense bfloat16 FLOP/s of a chip."""
    hbm_bandwidth: float | None = None
    """Bytes per second between a chip and its memory."""
    interconnect_bandwidth: float | None = None
    """Bytes per second a chip can send to its neighbors, over all its links together."""
    machines: Mapping[int, str] = field(default_factory=dict)
    """Compute Engine machine types by chips per host; larger slices use hosts of 4 chips."""
    topologies: Mapping[int, str] = field(default_factory=dict)
    """Topology of a slice by its number of chips; only these sizes exist."""
    cores: int = 1
    """Cores per chip, which gcloud counts in names."""
    gcloud: str = ""
    """Prefix of gcloud's accelerator type."""
    runtime_version: str = ""
    """TPU software version of a TPU VM."""
    image_family: str = ""
    """Compute Engine image family in `IMAGE_PROJECT`; empty: no Compute Engine VM."""
    gke: str = ""
    """GKE's name of the accelerator, which labels its nodes."""
    quota: Quota | None = None
    serving_quota: Quota | None = None
    """Quota of slices on one host, if they count separately."""
    price: Price | None = None


@dataclass(frozen=True)
class Machine:
    """The chips of one job."""

    accelerator: Accelerator
    chips: int

    @property
    def name(self) -> str:
        """The name that `parse_machine` reads."""
        if self.accelerator.platform == "cpu" and self.chips == 1:
            return self.accelerator.name
        return f"{self.accelerator.name}-{self.chips * self.accelerator.cores}"

    @property
    def hosts(self) -> int:
        """Number of hosts, which run one process each."""
        return math.ceil(self.chips / self.chips_per_host)

    @property
    def chips_per_host(self) -> int:
        """Chips per host; a multi-host TPU slice has 4 on each."""
        sizes = self.accelerator.machines or {self.chips: ""}
        if self.chips in sizes:
            return self.chips
        return 4 if self.accelerator.platform == "tpu" else max(sizes)

    @property
    def machine_type(self) -> str | None:
        """The Compute Engine machine type of each host."""
        return self.accelerator.machines.get(self.chips_per_host)

    @property
    def accelerator_type(self) -> str | None:
        """gcloud's --accelerator-type of a TPU VM."""
        if self.accelerator.platform != "tpu":
            return None
        return f"{self.accelerator.gcloud}-{self.chips * self.accelerator.cores}"

    @property
    def topology(self) -> str | None:
        """The topology of the slice, like 2x4."""
        return self.accelerator.topologies.get(self.chips)

    @property
    def topology_name(self) -> str | None:
        """The TPU compiler's name of the slice, like v5e:2x4."""
        return f"{self.accelerator.name}:{self.topology}" if self.topology else None

    @property
    def quota(self) -> Quota | None:
        """The quota the machine counts against."""
        if self.hosts == 1 and self.accelerator.serving_quota is not None:
            return self.accelerator.serving_quota
        return self.accelerator.quota

    def cost(self, seconds: float, *, spot: bool = False) -> float | None:
        """Return the USD for all chips over `seconds`; None if the price is not known."""
        price = self.accelerator.price
        hourly = None if price is None else price.spot if spot else price.on_demand
        return None if hourly is None else hourly * self.chips * seconds / 3600


IMAGE_PROJECT = "ubuntu-os-accelerator-images"
_TPU_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"

_PLANE = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
}  # fmt: skip
_V5E_SPOT = {"us-central1": 0.34, "us-west1": 0.34, "us-west4": 0.578}


def _tpu_quota(kind: str, slices: str = "") -> Quota:
    end = f"{slices}PerProjectPerZoneForTPUAPI"
    return Quota(f"TPU{kind}{end}", f"TPU{kind}Preemptible{end}")


def _gpu_quota(name: str) -> Quota:
    return Quota(f"NVIDIA_{name}_GPUS", f"PREEMPTIBLE_NVIDIA_{name}_GPUS")


ACCELERATORS = (
    Accelerator(
        name="v5e",
        platform="tpu",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        hbm_bytes=int(15.75 * GIB),
        peak_flops=197e12,
        hbm_bandwidth=819e9,
        interconnect_bandwidth=200e9,
        machines={n: f"ct5lp-hightpu-{n}t" for n in (1, 4, 8)},
        topologies=_PLANE,
        gcloud="v5litepod",
        runtime_version="v2-alpha-tpuv5-lite",
        gke="tpu-v5-lite-podslice",
        # Compute Engine refuses to create v5e machines, so there is no image family.
        quota=_tpu_quota("V5s", "Litepod"),
        serving_quota=_tpu_quota("V5s", "LitepodServing"),
        price=Price(1.20, 0.245, "2026-08", _V5E_SPOT),
    ),
    Accelerator(
        name="v5p",
        platform="tpu",
        device_kinds=("TPU v5p", "TPU v5"),
        hbm_bytes=int(95.73 * GIB),
        peak_flops=459e12,
        hbm_bandwidth=2765e9,
        interconnect_bandwidth=600e9,
        machines={4: "ct5p-hightpu-4t"},
        topologies=_CUBE,
        cores=2,
        gcloud="v5p",
        runtime_version="v2-alpha-tpuv5",
        gke="tpu-v5p-slice",
        image_family=_TPU_IMAGE,
        quota=_tpu_quota("V5P"),
        price=Price(4.20, 0.836, "2026-11"),
    ),
    Accelerator(
        name="v6e",
        platform="tpu",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        hbm_bytes=int(31.24 * GIB),
        peak_flops=918e12,
        hbm_bandwidth=1638e9,
        interconnect_bandwidth=400e9,
        machines={n: f"ct6e-standard-{n}t" for n in (1, 4, 8)},
        topologies=_PLANE,
        gcloud="v6e",
        runtime_version="v2-alpha-tpuv6e",
        gke="tpu-v6e-slice",
        image_family=_TPU_IMAGE,
        quota=_tpu_quota("V6E"),
        price=Price(2.70, 0.544, "2026-11"),
    ),
    Accelerator(
        name="v4",
        platform="tpu",
        device_kinds=("TPU v4",),
        hbm_bytes=int(30.5 * GIB),
        peak_flops=275e12,
        hbm_bandwidth=1228e9,
        interconnect_bandwidth=300e9,
        machines={4: "ct4p-hightpu-4t"},
        topologies=_CUBE,
        cores=2,
        gcloud="v4",
        runtime_version="tpu-ubuntu2204-base",
        gke="tpu-v4-podslice",
        price=Price(3.22, None, "2026-11"),
    ),
    Accelerator(
        name="h100",
        platform="gpu",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        hbm_bytes=int(79.6 * GIB),
        peak_flops=989e12,
        hbm_bandwidth=3350e9,
        interconnect_bandwidth=450e9,
        machines={n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)},
        gke="nvidia-h100-80gb",
        quota=_gpu_quota("H100"),
        price=Price(10.98, 3.35, "2026-11"),
    ),
    Accelerator(
        name="h200",
        platform="gpu",
        device_kinds=("NVIDIA H200",),
        hbm_bytes=int(139.8 * GIB),
        peak_flops=989e12,
        hbm_bandwidth=4800e9,
        interconnect_bandwidth=450e9,
        machines={8: "a3-ultragpu-8g"},
        gke="nvidia-h200-141gb",
        quota=_gpu_quota("H200"),
    ),
    Accelerator(
        name="a100",
        platform="gpu",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        hbm_bytes=int(79.2 * GIB),
        peak_flops=312e12,
        hbm_bandwidth=2039e9,
        interconnect_bandwidth=300e9,
        machines={n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)},
        gke="nvidia-a100-80gb",
        quota=_gpu_quota("A100_80GB"),
    ),
    Accelerator(name="cpu", platform="cpu", device_kinds=("cpu",)),
)


def find_accelerator(device_kind: str) -> Accelerator | None:
    """Return the accelerator that JAX calls `device_kind`; None if it is not in the registry."""
    return next((a for a in ACCELERATORS if device_kind in a.device_kinds), None)


def parse_machine(name: str) -> Machine:
    """Return the machine of a name like v5e-8, v5p-8 (4 chips of 2 cores), h100-1 or cpu.

    Without a number it is the smallest of its kind. gcloud's v5litepod-8 is accepted too.

    Raises:
        UsageError: there is no such kind, or it does not come in this size.
    """
    kinds = {a.name: a for a in ACCELERATORS} | {a.gcloud: a for a in ACCELERATORS if a.gcloud}
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d{1,6}))?", name.strip().lower())
    kind = kinds.get(match[1]) if match else None
    if match is None or kind is None:
        known = [a.name for a in ACCELERATORS]
        near = difflib.get_close_matches(name.lower().partition("-")[0], known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"{name!r} is not a known accelerator: write one of {', '.join(known)} and a "
            f"number, like v5e-8{hint}"
        )
    sizes = sorted(kind.topologies)
    number = int(match[2]) if match[2] else (sizes[0] if sizes else 1) * kind.cores
    chips, rest = divmod(number, kind.cores)
    if chips < 1 or rest or (sizes and chips not in sizes):
        offered = ", ".join(f"{kind.name}-{size * kind.cores}" for size in sizes)
        raise UsageError(
            f"{name!r}: {kind.name} does not have this size; write one of {offered}"
            if sizes
            else f"{name!r}: the number of devices must be at least 1"
        )
    return Machine(kind, chips)


def machine_sizes(kind: Accelerator) -> list[Machine]:
    """Return every size of an accelerator, up to 256 chips."""
    sizes = sorted(kind.topologies) or [1 << power for power in range(9)]
    return [Machine(kind, chips) for chips in sizes]


def machine_spec(machine: Machine) -> dict[str, Any]:
    """Return the cloud names, quotas and USD per hour of a machine, for scripts that start it."""
    kind, quota = machine.accelerator, machine.quota
    return {
        "machine": machine.name,
        "platform": kind.platform,
        "chips": machine.chips,
        "hosts": machine.hosts,
        "accelerator_type": machine.accelerator_type,
        "runtime_version": kind.runtime_version or None,
        "machine_type": machine.machine_type,
        "image_family": kind.image_family or None,
        "image_project": IMAGE_PROJECT if kind.image_family else None,
        "topology": machine.topology,
        "quota": quota.on_demand if quota else None,
        "spot_quota": quota.spot if quota else None,
        "usd_per_hour": machine.cost(3600),
        "spot_usd_per_hour": machine.cost(3600, spot=True),
        "spot_usd_per_hour_by_region": {
            region: usd * machine.chips
            for region, usd in (kind.price.spot_by_region if kind.price else {}).items()
        },
        "prices_of": kind.price.date if kind.price else None,
    }
