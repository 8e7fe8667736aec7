"""`job plan`: what the next run would do and cost, without doing it."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from job.errors import JobError, UsageError
from job.machine.accelerators import Machine, machine_sizes, parse_machine
from job.pipeline.run import Preflight, StageRecord
from job.pipeline.stages import STAGES, stage_digests
from job.pipeline.status import read_stage_records, stale_stages
from job.plan.estimate import MFU
from job.plan.model_shape import Config, find_config
from job.plan.plan import MachinePlan, Plan, default_machine, make_plan
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
    """Every size of each kind, instead of one."""
    compile: bool = False
    """Ask the TPU's compiler too."""
    examples: int | None = None
    tokens: int | None = None
    mfu: float = MFU


def plan_job(loaded: LoadedSpec, asked: PlanOptions) -> Plan:
    """The plan of a spec, from its preset's configuration and what its run has left.

    Raises:
        UsageError: a machine that does not exist, a model whose shape is not known.
    """
    if not 0 < asked.mfu <= 1:
        raise UsageError(f"--mfu {asked.mfu}: write a share of the peak, like {MFU}")
    for option, number in (("--examples", asked.examples), ("--tokens", asked.tokens)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number}: write a number above 0")
    spec = loaded.spec
    machines = [parse_machine(name) for name in asked.on] or [default_machine(spec)]
    if asked.sizes:
        machines = _all_sizes(machines)
    config = find_config(spec.model)
    if asked.compile:
        if asked.sizes:
            raise UsageError("--compile shows programs and --table sizes; leave one of them out")
        _check_compiles(machines)
        log = logs.RunLog()
        log.discard()
        logs.configure(log, sys.stderr)  # stdout is the plan's
    store = open_store(child_uri(spec.output, run_id(spec)))
    stale, known, unread = _standing(spec, store)
    work = workload(spec, known, asked.examples, asked.tokens)
    work = replace(work, assumptions=(*work.assumptions, *unread))
    plan = make_plan(
        spec,
        source=loaded.source,
        run=store.uri,
        config=config,
        machines=machines,
        stale=stale,
        work=work,
        mfu=asked.mfu,
    )
    if not asked.compile:
        return plan
    compiled = [_compiled(spec, config, found, work) for found in plan.machines]
    return plan.model_copy(update={"machines": compiled})


def _standing(spec: Spec, store: Store) -> tuple[list[str], DataInfo | None, tuple[str, ...]]:
    """The stages to run, what the data stage found if it is done, and what could not be read.

    A plan needs no credentials: a bucket that cannot be read counts as empty, and that is said.
    """
    try:
        markers = read_stage_records(store)
        stale = stale_stages(spec, store, markers, stage_digests(spec, _revisions(markers)))
    except JobError as error:
        return [stage.name for stage in STAGES], None, (f"nothing is done yet ({error})",)
    return stale, _found(markers) if "data" not in stale else None, ()


def _check_compiles(machines: Sequence[Machine]) -> None:
    for wanted in machines:
        if wanted.topology_name is None:
            raise UsageError(
                f"--compile: {wanted.name} is no TPU, and no other compiler works without its "
                "device; leave --compile out, or name a TPU with --on"
            )


def _compiled(spec: Spec, config: Config, found: MachinePlan, work: Workload) -> MachinePlan:
    """A machine's plan with its programs, compiled for the mesh that the plan says."""
    from job.machine import devices

    wanted = parse_machine(found.machine)
    mesh = Mesh(data=found.mesh["data"], model=found.mesh["model"])
    update = {"runtime": spec.runtime.model_copy(update={"mesh": mesh})}
    with devices.compiling_for(wanted) as chips:
        from job.plan.tpu_compile import Compiler

        compiler = Compiler(
            spec.model_copy(update=update),
            config,
            replace(work, batch_size=found.batch_size),
            wanted,
            devices.make_mesh(update["runtime"], chips),
        )
        programs = list(compiler.programs(found.micro_batch))
    return found.model_copy(update={"programs": programs})


def _all_sizes(machines: Sequence[Machine]) -> list[Machine]:
    kinds = {m.accelerator.name: m.accelerator for m in machines}
    return [size for kind in kinds.values() for size in machine_sizes(kind)]


def _revisions(markers: dict[str, StageRecord]) -> dict[str, str]:
    with contextlib.suppress(ValidationError, KeyError):
        return Preflight.model_validate(markers["preflight"].outcome).revisions
    return {}


def _found(markers: dict[str, StageRecord]) -> DataInfo | None:
    with contextlib.suppress(ValidationError, KeyError):
        return DataInfo.model_validate(markers["data"].outcome)
    return None
