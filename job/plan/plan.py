"""The result of `job plan` as one pydantic model, printed as text or JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel

from job.chat.templates import planned_template
from job.machine.accelerators import Machine, parse_machine
from job.pipeline.stages import STAGES
from job.plan.estimate import MFU, MachineEstimate, estimate
from job.plan.model_shape import Config, ModelShape, model_shape
from job.plan.workload import Workload
from job.spec.schema import Mesh, Spec


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


class WorkPlan(BaseModel):
    """The workload of the spec."""

    examples: int
    tokens: int
    rows: int
    row_length: int
    steps: int
    slots_a_step: int
    evaluations: dict[str, int]
    """Prompts by evaluation."""
    assumptions: list[str]


class MemoryPlan(BaseModel):
    """Bytes on each device while training."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int
    total: int
    limit: int | None
    fits: bool | None


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
    steps: int
    rows_a_device: int
    micro_batch: int
    memory: MemoryPlan
    flops_a_step: float
    step_seconds: float | None
    tokens_per_second: float | None
    stage_seconds: dict[str, float] | None
    seconds: float | None
    cost: MachineCost | None
    advice: list[str]
    programs: list[Program] = []


class Plan(BaseModel):
    """The result of `job plan`."""

    spec: str
    run: str
    stages: list[StagePlan]
    model: ModelPlan
    work: WorkPlan
    mfu: float
    machines: list[MachinePlan]


@dataclass(frozen=True)
class PlanInput:
    """A spec and what a plan needs to know besides it."""

    spec: Spec
    source: str
    """Path, URI or name of the spec."""
    run: str
    """URI of the run."""
    config: Config
    """The preset's config.json."""
    machines: Sequence[Machine]
    stale: Sequence[str]
    """Names of the stages that the next run would not skip."""
    work: Workload
    mfu: float = MFU
    """Assumed share of peak FLOP/s."""


def make_plan(given: PlanInput) -> Plan:
    """Return the plan of a spec for some machines.

    Raises:
        UsageError: the shape of the model is not known, or the spec does not match it.
    """
    spec, work, stale = given.spec, given.work, given.stale
    shape = model_shape(given.config, spec.model.preset)
    return Plan(
        spec=given.source,
        run=given.run,
        stages=[StagePlan(name=stage.name, skipped=stage.name not in stale) for stage in STAGES],
        model=ModelPlan(
            preset=spec.model.preset,
            chat_template=planned_template(spec.model.chat_template, spec.model.preset),
            family=shape.family,
            dtype=spec.model.dtype,
            parameters=shape.parameters,
            trainable=shape.adapter(spec.model.lora),
        ),
        work=_work(work),
        mfu=given.mfu,
        machines=[plan for machine in given.machines for plan in _on(machine, shape, given)],
    )


def _work(work: Workload) -> WorkPlan:
    return WorkPlan(
        examples=work.examples,
        tokens=work.tokens,
        rows=work.rows,
        row_length=work.row_length,
        steps=work.steps,
        slots_a_step=work.slots_a_step,
        evaluations={evaluation.name: evaluation.prompts for evaluation in work.evaluations},
        assumptions=list(work.assumptions),
    )


def _on(machine: Machine, shape: ModelShape, given: PlanInput) -> Iterator[MachinePlan]:
    """Yield the plan with the spec's mesh and, if that does not fit, with one that does."""
    spec = given.spec
    estimated = estimate(shape, spec, given.work, machine, given.mfu)
    yield _machine_plan(estimated)
    model = spec.runtime.mesh.model
    while estimated.fits is False and (model := model * 2) <= machine.chips:
        mesh = Mesh(data="auto", model=model)
        runtime = spec.runtime.model_copy(update={"mesh": mesh})
        sharded = spec.model_copy(update={"runtime": runtime})
        estimated = estimate(shape, sharded, given.work, machine, given.mfu)
        if estimated.fits:
            yield _machine_plan(estimated)


def _machine_plan(estimated: MachineEstimate) -> MachinePlan:
    machine, layout = estimated.machine, estimated.layout
    kind, quota = machine.accelerator, machine.quota
    step = estimated.step_seconds
    return MachinePlan(
        machine=machine.name,
        chips=machine.chips,
        hosts=machine.hosts,
        machine_type=machine.machine_type,
        accelerator_type=machine.accelerator_type,
        runtime_version=kind.runtime_version or None,
        topology=machine.topology,
        quota=quota.on_demand if quota else None,
        spot_quota=quota.spot if quota else None,
        mesh={"data": layout.data, "model": layout.model},
        batch_size=estimated.work.batch_size,
        steps=estimated.work.steps,
        rows_a_device=layout.rows,
        micro_batch=layout.micro,
        memory=MemoryPlan(
            **asdict(estimated.memory),
            total=estimated.memory.total,
            limit=kind.hbm_bytes,
            fits=estimated.fits,
        ),
        flops_a_step=estimated.flops_a_step,
        step_seconds=step,
        tokens_per_second=None if step is None else estimated.work.slots_a_step / step,
        stage_seconds=estimated.stage_seconds,
        seconds=estimated.seconds,
        cost=_cost(estimated),
        advice=list(estimated.advice),
    )


def _cost(estimated: MachineEstimate) -> MachineCost | None:
    price, seconds = estimated.machine.accelerator.price, estimated.seconds
    if price is None or seconds is None:
        return None
    return MachineCost(
        on_demand=estimated.machine.cost(seconds),
        spot=estimated.machine.cost(seconds, spot=True),
        prices_of=price.date,
    )


def default_machine(spec: Spec) -> Machine:
    """Return the machine a spec is written for; a v5e-8 if it does not say."""
    runtime = spec.runtime
    if runtime.platform == "cpu":
        return parse_machine(f"cpu-{runtime.devices or 1}")
    if runtime.platform == "gpu":
        return parse_machine(f"h100-{runtime.devices or 1}")
    return parse_machine(f"v5e-{runtime.devices or 8}")
