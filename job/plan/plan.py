"""The result of `job plan` as one pydantic model, printed as text or JSON."""

from pydantic import BaseModel, computed_field

from job.machine.accelerators import Machine, parse_machine
from job.machine.limits import USABLE_SHARE
from job.plan.workload import Workload
from job.spec.schema import Spec


class StagePlan(BaseModel):
    """A stage of the next run."""

    name: str
    skipped: bool


class ModelPlan(BaseModel):
    """The model of the spec and its size."""

    preset: str
    chat_template: str
    family: str
    dtype: str
    parameters: int
    trainable: int


class MemoryPlan(BaseModel):
    """Bytes on each device while training, by part."""

    weights: int
    adapter: int
    """LoRA weights and their gradients."""
    optimizer: int
    activations: int
    logits: int
    limit: int | None
    """Bytes of a device; None if not known."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.logits

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fits(self) -> bool | None:
        """Whether the total fits a device; None if that is not known."""
        return None if self.limit is None else self.total <= USABLE_SHARE * self.limit


class MachineCost(BaseModel):
    """Cost in USD of the stages that use the devices, at list prices of a date."""

    on_demand: float | None
    spot: float | None
    prices_of: str


class Program(BaseModel):
    """One program compiled for the accelerator, with its figures per device."""

    name: str
    fits: bool
    bytes: int
    """Bytes of arguments, outputs and temporaries."""
    temporary_bytes: int
    flops: float
    bytes_accessed: float
    collective_bytes: float
    collectives: dict[str, int]
    """Number of collective operations by kind."""
    seconds: float
    """Roofline time: the longest of arithmetic, memory and links."""
    bound: str
    compile_seconds: float
    detail: dict[str, float]


class MachinePlan(BaseModel):
    """The plan for one machine."""

    machine: str
    chips: int
    hosts: int
    machine_type: str | None
    accelerator_type: str | None
    runtime_version: str | None
    topology: str | None
    quota: str | None
    spot_quota: str | None
    mesh: dict[str, int]
    batch_size: int
    """Rows of a step that the mesh divides."""
    steps: int
    rows_a_device: int
    micro_batch: int
    """Per-device batch size; the rest of the device's rows is accumulated."""
    memory: MemoryPlan
    flops_a_step: float
    """FLOPs of a step over all devices."""
    step_seconds: float | None
    tokens_per_second: float | None
    stage_seconds: dict[str, float] | None
    """Seconds of the stages that use the devices; None if the machine's speed is not known."""
    seconds: float | None
    cost: MachineCost | None
    advice: list[str]
    """Settings to change if it does not fit."""
    programs: list[Program] = []


class Plan(BaseModel):
    """The result of `job plan`."""

    spec: str
    run: str
    stages: list[StagePlan]
    model: ModelPlan
    work: Workload
    machines: list[MachinePlan]


def default_machine(spec: Spec) -> Machine:
    """Return the machine a spec is written for; a v5e-8 if it does not say."""
    kind, count = {"cpu": ("cpu", 1), "gpu": ("h100", 1)}.get(spec.runtime.platform, ("v5e", 8))
    return parse_machine(f"{kind}-{spec.runtime.devices or count}")
