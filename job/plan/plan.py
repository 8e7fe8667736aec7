"""What `job plan` finds out, as one model: the same for people and, as JSON, for tools."""

from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from job.machine.accelerators import Machine, parse_machine
from job.pipeline.stages import STAGES
from job.plan.estimate import MFU, MachineEstimate, estimate
from job.plan.model_shape import Config, ModelShape, model_shape
from job.plan.workload import Workload
from job.spec.schema import Mesh, Spec


class StagePlan(BaseModel):
    """A stage, and whether the next run would skip it."""

    name: str
    skipped: bool


class ModelPlan(BaseModel):
    """The model of the spec."""

    preset: str
    family: str
    dtype: str
    parameters: int
    trainable: int


class WorkPlan(BaseModel):
    """What there is to do."""

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
    """USD of the stages that use the devices, at list prices of a date."""

    on_demand: float | None
    spot: float | None
    prices_of: str


class Program(BaseModel):
    """One program, compiled for the accelerator; figures are a device's."""

    name: str
    fits: bool
    bytes: int
    """Memory: arguments and temporaries."""
    temporary_bytes: int
    flops: float
    bytes_accessed: float
    collective_bytes: float
    collectives: dict[str, int]
    """Operations between devices, by kind."""
    seconds: float
    """By the roofline: whichever of arithmetic, memory and links takes longest."""
    bound: str
    compile_seconds: float
    detail: dict[str, float]


class MachinePlan(BaseModel):
    """The spec on one machine."""

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
    """The answer to `job plan`."""

    spec: str
    run: str
    stages: list[StagePlan]
    model: ModelPlan
    work: WorkPlan
    mfu: float
    machines: list[MachinePlan]


def make_plan(
    spec: Spec,
    *,
    source: str,
    run: str,
    config: Config,
    machines: Sequence[Machine],
    stale: Sequence[str],
    work: Workload,
    mfu: float = MFU,
) -> Plan:
    """The plan of a spec.

    Args:
        config: the preset's configuration.
        work: what there is to do.
        stale: names of the stages that the next run would run.
        mfu: share of the peak that is assumed.

    Raises:
        UsageError: the shape of the model is not known, or the spec does not fit it.
    """
    shape = model_shape(config, spec.model.preset)
    return Plan(
        spec=source,
        run=run,
        stages=[StagePlan(name=stage.name, skipped=stage.name not in stale) for stage in STAGES],
        model=ModelPlan(
            preset=spec.model.preset,
            family=shape.family,
            dtype=spec.model.dtype,
            parameters=shape.parameters,
            trainable=shape.adapter(spec.model.lora),
        ),
        work=_work(work),
        mfu=mfu,
        machines=[found for wanted in machines for found in _on(shape, spec, work, wanted, mfu)],
    )


def _work(work: Workload) -> WorkPlan:
    return WorkPlan(
        examples=work.examples,
        tokens=work.tokens,
        rows=work.rows,
        row_length=work.row_length,
        steps=work.steps,
        slots_a_step=work.slots_a_step,
        evaluations={asked.name: asked.prompts for asked in work.evaluations},
        assumptions=list(work.assumptions),
    )


def _on(
    shape: ModelShape, spec: Spec, work: Workload, wanted: Machine, mfu: float
) -> Iterator[MachinePlan]:
    """The spec's own mesh and, where that does not fit, the smallest split of the weights."""
    found = estimate(shape, spec, work, wanted, mfu)
    yield _machine_plan(found)
    model = spec.runtime.mesh.model
    while found.fits is False and (model := model * 2) <= wanted.chips:
        mesh = Mesh(data="auto", model=model)
        runtime = spec.runtime.model_copy(update={"mesh": mesh})
        split = spec.model_copy(update={"runtime": runtime})
        found = estimate(shape, split, work, wanted, mfu)
        if found.fits:
            yield _machine_plan(found)


def _machine_plan(found: MachineEstimate) -> MachinePlan:
    wanted = found.machine
    kind, quota = wanted.accelerator, wanted.quota
    step = found.step_seconds
    return MachinePlan(
        machine=wanted.name,
        chips=wanted.chips,
        hosts=wanted.hosts,
        machine_type=wanted.machine_type,
        accelerator_type=wanted.accelerator_type,
        runtime_version=kind.runtime_version or None,
        topology=wanted.topology,
        quota=quota.on_demand if quota else None,
        spot_quota=quota.spot if quota else None,
        mesh={"data": found.layout.data, "model": found.layout.model},
        batch_size=found.work.batch_size,
        steps=found.work.steps,
        rows_a_device=found.layout.rows,
        micro_batch=found.layout.micro,
        memory=MemoryPlan(
            weights=found.memory.weights,
            adapter=found.memory.adapter,
            optimizer=found.memory.optimizer,
            activations=found.memory.activations,
            logits=found.memory.logits,
            total=found.memory.total,
            limit=kind.hbm_bytes,
            fits=found.fits,
        ),
        flops_a_step=found.flops_a_step,
        step_seconds=step,
        tokens_per_second=None if step is None else found.work.slots_a_step / step,
        stage_seconds=found.stage_seconds,
        seconds=found.seconds,
        cost=_cost(found),
        advice=list(found.advice),
    )


def _cost(found: MachineEstimate) -> MachineCost | None:
    price, seconds = found.machine.accelerator.price, found.seconds
    if price is None or seconds is None:
        return None
    return MachineCost(
        on_demand=found.machine.cost(seconds),
        spot=found.machine.cost(seconds, spot=True),
        prices_of=price.date,
    )


def default_machine(spec: Spec) -> Machine:
    """The machine that a spec is made for, or a v5e-8 where it says nothing."""
    runtime = spec.runtime
    if runtime.platform == "cpu":
        return parse_machine(f"cpu-{runtime.devices or 1}")
    if runtime.platform == "gpu":
        return parse_machine(f"h100-{runtime.devices or 1}")
    return parse_machine(f"v5e-{runtime.devices or 8}")
