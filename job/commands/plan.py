"""`job plan`: the stages, memory, time and cost of the next run, without starting it."""

import contextlib
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from job.chat.templates import planned_template
from job.errors import JobError, UsageError
from job.machine.accelerators import Machine, machine_sizes, parse_machine
from job.pipeline.stages import STAGES
from job.pipeline.status import read_run_status
from job.plan.estimate import plan_machine
from job.plan.model_shape import Config, find_config, model_shape
from job.plan.plan import MachinePlan, ModelPlan, Plan, Program, StagePlan, default_machine
from job.plan.workload import Workload, workload
from job.results import DataInfo
from job.runtime import logs
from job.spec.load import LoadedSpec, run_id
from job.spec.schema import Mesh, Spec
from job.storage.base import Store
from job.storage.locations import child_uri, open_store


def plan_job(
    loaded: LoadedSpec,
    on: Sequence[str] = (),
    *,
    sizes: bool = False,
    compiled: bool = False,
    examples: int | None = None,
    tokens: int | None = None,
) -> Plan:
    """Return the plan of a spec, from its preset's configuration and the records of its run.

    Args:
        on: names of machines; by default the one the spec is written for.
        sizes: plan for every size of each machine.
        compiled: compile the programs for the TPU.
        examples, tokens: see `workload`.

    Raises:
        UsageError: there is no such machine, or the model's shape is not known.
    """
    spec = loaded.spec
    machines = [parse_machine(name) for name in on] or [default_machine(spec)]
    if sizes:
        kinds = {machine.accelerator.name: machine.accelerator for machine in machines}
        machines = [size for kind in kinds.values() for size in machine_sizes(kind)]
    config = find_config(spec.model)
    if compiled:
        _prepare_to_compile(machines, sizes)
    store = open_store(child_uri(spec.output, run_id(spec)))
    stale, data, unread = _progress(spec, store)
    work = workload(spec, data, examples, tokens)
    work.assumptions += unread
    shape = model_shape(config, spec.model.preset)
    plans = [plan for machine in machines for plan in plan_machine(shape, spec, work, machine)]
    if compiled:
        for plan in plans:
            plan.programs = _compile(spec, config, plan, work)
    return Plan(
        spec=loaded.source,
        run=store.uri,
        stages=[StagePlan(name=stage.name, skipped=stage.name not in stale) for stage in STAGES],
        model=ModelPlan(
            preset=spec.model.preset,
            chat_template=planned_template(spec.model.chat_template, spec.model.preset),
            family=shape.family,
            dtype=spec.model.dtype,
            parameters=shape.parameters,
            trainable=shape.adapter(spec.model.lora),
        ),
        work=work,
        machines=plans,
    )


def _progress(spec: Spec, store: Store) -> tuple[list[str], DataInfo | None, tuple[str, ...]]:
    """Return the remaining stages, the data stage's result if it is done, and assumptions.

    A plan needs no credentials: a bucket that cannot be read counts as empty, with an assumption.
    """
    try:
        status = read_run_status(spec, store)
    except JobError as error:
        return [stage.name for stage in STAGES], None, (f"nothing is done yet ({error})",)
    data = None
    if "data" not in status.stale:
        with contextlib.suppress(ValidationError):
            data = DataInfo.model_validate(status.records["data"].outcome)
    return status.stale, data, ()


def _prepare_to_compile(machines: Sequence[Machine], sizes: bool) -> None:
    if sizes:
        raise UsageError("--compile shows programs and --table sizes; leave one of them out")
    for machine in machines:
        if machine.topology_name is None:
            raise UsageError(
                f"--compile: {machine.name} is not a TPU, and other compilers need their device; "
                "leave --compile out, or name a TPU with --on"
            )
    logs.configure(None, sys.stderr)  # stdout is the plan's


def _compile(spec: Spec, config: Config, plan: MachinePlan, work: Workload) -> list[Program]:
    """Return the programs of a machine, compiled for the mesh of its plan."""
    from job.machine import devices

    machine = parse_machine(plan.machine)
    mesh = Mesh(data=plan.mesh["data"], model=plan.mesh["model"])
    update = {"runtime": spec.runtime.model_copy(update={"mesh": mesh})}
    with devices.compiling_for(machine) as chips:
        from job.plan.tpu_compile import Compiler

        compiler = Compiler(
            spec.model_copy(update=update),
            config,
            work.model_copy(update={"batch_size": plan.batch_size}),
            machine,
            devices.make_mesh(update["runtime"], chips),
        )
        return list(compiler.programs(plan.micro_batch))
