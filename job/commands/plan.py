"""`job plan`: the stages, memory, time and cost of the next run, without starting it."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from job.errors import JobError, UsageError
from job.machine.accelerators import Machine, machine_sizes, parse_machine
from job.pipeline.run import StageRecord
from job.pipeline.stages import STAGES, stage_digests
from job.pipeline.status import earlier_preflight, read_stage_records, stale_stages
from job.plan.estimate import MFU
from job.plan.model_shape import Config, find_config
from job.plan.plan import MachinePlan, Plan, PlanInput, default_machine, make_plan
from job.plan.workload import Workload, workload
from job.results import DataInfo
from job.runtime import logs
from job.spec.load import LoadedSpec, run_id
from job.spec.schema import Mesh, Spec
from job.storage.base import Store
from job.storage.locations import child_uri, open_store


@dataclass(frozen=True)
class PlanOptions:
    """The options of the command."""

    on: Sequence[str] = ()
    sizes: bool = False
    """Plan for every size of each machine, instead of one."""
    compile: bool = False
    """Compile the programs for the TPU."""
    examples: int | None = None
    tokens: int | None = None
    mfu: float = MFU


def plan_job(loaded: LoadedSpec, options: PlanOptions) -> Plan:
    """Return the plan of a spec, from its preset's configuration and the records of its run.

    Raises:
        UsageError: there is no such machine, or the model's shape is not known.
    """
    if not 0 < options.mfu <= 1:
        raise UsageError(f"--mfu {options.mfu}: write a share of peak FLOP/s, like {MFU}")
    for option, number in (("--examples", options.examples), ("--tokens", options.tokens)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: write a number above 0")
    spec = loaded.spec
    machines = [parse_machine(name) for name in options.on] or [default_machine(spec)]
    if options.sizes:
        machines = _all_sizes(machines)
    config = find_config(spec.model)
    if options.compile:
        if options.sizes:
            raise UsageError("--compile shows programs and --table sizes; leave one of them out")
        _check_compiles(machines)
        log = logs.RunLog()
        log.discard()
        logs.configure(log, sys.stderr)  # stdout is the plan's
    store = open_store(child_uri(spec.output, run_id(spec)))
    stale, data, unread = _progress(spec, store)
    work = workload(spec, data, options.examples, options.tokens)
    work = replace(work, assumptions=(*work.assumptions, *unread))
    plan = make_plan(
        PlanInput(spec, loaded.source, store.uri, config, machines, stale, work, options.mfu)
    )
    if not options.compile:
        return plan
    compiled = [_with_programs(spec, config, machine, work) for machine in plan.machines]
    return plan.model_copy(update={"machines": compiled})


def _progress(spec: Spec, store: Store) -> tuple[list[str], DataInfo | None, tuple[str, ...]]:
    """Return the remaining stages, the data stage's result if it is done, and assumptions.

    A plan needs no credentials: a bucket that cannot be read counts as empty, with an assumption.
    """
    try:
        records = read_stage_records(store)
        revisions = earlier_preflight(records).revisions
        stale = stale_stages(spec, store, records, stage_digests(spec, revisions))
    except JobError as error:
        return [stage.name for stage in STAGES], None, (f"nothing is done yet ({error})",)
    return stale, _data_info(records) if "data" not in stale else None, ()


def _check_compiles(machines: Sequence[Machine]) -> None:
    for machine in machines:
        if machine.topology_name is None:
            raise UsageError(
                f"--compile: {machine.name} is not a TPU, and other compilers need their device; "
                "leave --compile out, or name a TPU with --on"
            )


def _with_programs(spec: Spec, config: Config, plan: MachinePlan, work: Workload) -> MachinePlan:
    """Return a machine's plan with its programs, compiled for the mesh of the plan."""
    from job.machine import devices

    machine = parse_machine(plan.machine)
    mesh = Mesh(data=plan.mesh["data"], model=plan.mesh["model"])
    update = {"runtime": spec.runtime.model_copy(update={"mesh": mesh})}
    with devices.compiling_for(machine) as chips:
        from job.plan.tpu_compile import Compiler

        compiler = Compiler(
            spec.model_copy(update=update),
            config,
            replace(work, batch_size=plan.batch_size),
            machine,
            devices.make_mesh(update["runtime"], chips),
        )
        programs = list(compiler.programs(plan.micro_batch))
    return plan.model_copy(update={"programs": programs})


def _all_sizes(machines: Sequence[Machine]) -> list[Machine]:
    kinds = {m.accelerator.name: m.accelerator for m in machines}
    return [size for kind in kinds.values() for size in machine_sizes(kind)]


def _data_info(records: dict[str, StageRecord]) -> DataInfo | None:
    with contextlib.suppress(ValidationError, KeyError):
        return DataInfo.model_validate(records["data"].outcome)
    return None
