"""The stages in order: what is skipped, what is run again, what is resumed.

A stage is a function of some sections of the spec and of the stages it needs. Its marker,
written last, holds the digest of those inputs and the files it left. A stage whose digest
matches and whose files are there is skipped; any other is run, and with it all that
depends on it, because their markers are removed before it begins.
"""

import contextlib
import contextvars
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import structlog
import yaml
from pydantic import BaseModel, ValidationError

from job.errors import JobError, RunStoppedError, SetupError, StageError, UsageError
from job.machine import devices
from job.machine.distributed import join_processes
from job.pipeline.preflight import check_inputs, checked_id
from job.pipeline.run import (
    RESULTS,
    Preflight,
    Run,
    StageRecord,
    hold_run_lease,
    now,
    read_results,
)
from job.pipeline.run_log import LOG, LogKeeper
from job.pipeline.stages import (
    NAMES,
    STAGES,
    Stage,
    dependents,
    read_stage_records,
    stage_digests,
    write_results,
)
from job.runtime import logs
from job.runtime.signals import STOP
from job.runtime.watchdog import WATCHDOG
from job.spec.load import LoadedSpec, digest
from job.spec.pinning import resolve_all
from job.spec.schema import Spec
from job.storage import retry
from job.storage.base import ReadOnlyStore, Store
from job.storage.locations import child_uri, open_store

SPEC = "spec.yaml"


_OWNED = (RESULTS, SPEC, "report.", "stages/", "data/", "evals/", "train/", "adapter/", "logs/")
"""What a run may leave in its folder, and all that --fresh removes from it."""


def stale_stages(
    spec: Spec, store: Store, markers: dict[str, StageRecord], digests: dict[str, str]
) -> list[str]:
    """Names of the stages that must run, in order."""
    stale: list[str] = []
    for stage in STAGES:
        marker = markers.get(stage.name)
        if (
            marker is None
            or marker.digest != digests[stage.name]
            or any(need in stale for need in stage.needs)
            or any(store.size(item.path) != item.bytes for item in marker.outputs)
            or stage.unfinished(marker, spec)
        ):
            stale.append(stage.name)
    return stale


def run_job(
    loaded: LoadedSpec,
    *,
    run_id: str | None = None,
    until: str | None = None,
    fresh: bool = False,
) -> None:
    """Run all stages that are not done yet, up to and including `until`.

    Raises:
        JobError: with the exit code of what went wrong.
    """
    spec = loaded.spec
    identity = checked_id(run_id, spec)
    if until is not None and until not in NAMES:
        raise UsageError(
            f"--until {until}: there is no such stage; write one of {', '.join(NAMES)}"
        )
    check_inputs(spec)
    run_log = logs.RunLog()
    logs.configure(run_log)
    structlog.contextvars.bind_contextvars(run_id=identity)
    _enter("preflight")
    retry.check_while_waiting(STOP.check)
    with WATCHDOG.watching(spec.runtime.stall_minutes, lambda code, why: STOP.leave(code, why)):
        _run_joined(loaded, identity, until, run_log, fresh=fresh)


def _run_joined(
    loaded: LoadedSpec, identity: str, until: str | None, run_log: logs.RunLog, *, fresh: bool
) -> None:
    """Run the job as one of its processes."""
    spec = loaded.spec
    processes = join_processes(spec.runtime)
    here = contextvars.copy_context()  # the log of a thread that ends the job names the run
    STOP.leave = lambda code, why: here.run(processes.leave, code, why)
    store = open_store(child_uri(spec.output, identity))
    if not processes.is_primary:
        structlog.contextvars.bind_contextvars(process=processes.index)
        logs.configure(run_log, least=logging.WARNING)
        run_log.discard()
        store = ReadOnlyStore(store)
    with processes.together():
        standing = RunStatus.model_validate_json(
            processes.broadcast(lambda: _run_status(spec, store, fresh=fresh).model_dump_json())
        )
        wanted = NAMES[: NAMES.index(until) + 1] if until else NAMES
        to_do = [s for s in STAGES if s.name in standing.stale and s.name in wanted]
        if not to_do and "preflight" in standing.markers:
            _say_skipped(wanted)
            _say_end(store, "report" in wanted)
            return
        logs.get().info(
            "job started", spec=loaded.source, run=store.uri, to_do=[stage.name for stage in to_do]
        )
        try:
            environment = devices.start(spec)
        except SetupError as problem:
            logs.get().error("the machine is not what the spec asks for", error=str(problem))
            raise
        with tempfile.TemporaryDirectory(prefix="job-") as work:
            run = Run(identity, spec, store, Path(work), STOP, environment, processes=processes)
            run.records = standing.markers
            unchanged = partial(_is_as_before, standing, spec, store, fresh=fresh)
            with STOP.graceful(), hold_run_lease(run, unchanged):
                _run_whole(run, standing, to_do, wanted, run_log, fresh=fresh)


class RunStatus(BaseModel):
    """What there is of a run when the command begins."""

    markers: dict[str, StageRecord]
    stale: list[str]
    """Stages that must run, in order."""
    whole: bool
    """Whether the results are there."""


def _run_status(spec: Spec, store: Store, *, fresh: bool) -> RunStatus:
    markers = {} if fresh else read_stage_records(store)
    digests = stage_digests(spec, _earlier(markers).revisions)
    stale = stale_stages(spec, store, markers, digests)
    whole = read_results(store) is not None and _is_there(store, markers.get("preflight"))
    if not whole and "report" not in stale:
        stale.append("report")
    return RunStatus(markers=markers, stale=stale, whole=whole)


def _is_as_before(standing: RunStatus, spec: Spec, store: Store, *, fresh: bool) -> bool:
    return _run_status(spec, store, fresh=fresh) == standing


def _enter(stage: str) -> None:
    """Let the log, and the pulse, name this stage from now on."""
    structlog.contextvars.bind_contextvars(stage=stage)
    WATCHDOG.stage = stage
    WATCHDOG.beat()


def _run_whole(
    run: Run,
    standing: RunStatus,
    to_do: Sequence[Stage],
    wanted: Sequence[str],
    run_log: logs.RunLog,
    *,
    fresh: bool,
) -> None:
    """Run the stages, and keep the log whatever becomes of them."""
    log = logs.get()
    if fresh:
        _forget(run.store)
    keeper = LogKeeper(run.store, run_log, run.work) if run.processes.is_primary else None
    keep = keeper.keep if keeper else lambda: None

    def leave() -> None:
        retry.check_while_waiting(lambda: None)  # the last calls are not stopped themselves
        keep()
        if run.lease is not None:
            run.lease.release()

    run.processes.before_exit = leave
    try:
        _preflight(run, resumed=bool(standing.markers) and not standing.whole)
        _run_stages(run, to_do, wanted, keep)
        _say_end(run.store, "report" in wanted)
    except RunStoppedError as stopped:
        log.warning(str(stopped))
        raise
    except JobError as error:
        log.error("stage failed", error=str(error))
        raise
    except Exception as error:
        if gone := run.processes.lost(error):
            log.error(str(gone), error=repr(error))
            raise gone from error
        log.error("stage failed", error=repr(error), traceback=traceback.format_exc())
        raise StageError(
            f"unexpected {type(error).__name__}: {error}; this is a defect, and its traceback "
            f"is in {child_uri(run.store.uri, LOG)}"
        ) from error
    finally:
        if keeper:
            keeper.close()


def _earlier(markers: dict[str, StageRecord]) -> Preflight:
    """The outcome of the earlier preflight; an empty one where there was none."""
    if "preflight" in markers:
        with contextlib.suppress(ValidationError):
            return Preflight.model_validate(markers["preflight"].outcome)
    return Preflight(first_started=now(), resumes=0, revisions={})


def _is_there(store: Store, marker: StageRecord | None) -> bool:
    return marker is not None and all(
        store.size(item.path) == item.bytes for item in marker.outputs
    )


def _forget(store: Store) -> None:
    """Remove what an earlier run left, its results first, and nothing else."""
    for key in sorted(
        store.list(), key=lambda key: (key != RESULTS, not key.startswith("stages/"))
    ):
        if key.startswith(_OWNED):
            store.delete(key)


def _preflight(run: Run, *, resumed: bool) -> None:
    """Record the machine and the commits to read; runs whenever another stage does."""
    made = run.processes.broadcast(lambda: _lead_preflight(run, resumed=resumed).model_dump_json())
    marker = StageRecord.model_validate_json(made)
    run.records["preflight"] = marker
    run.revisions = Preflight.model_validate(marker.outcome).revisions
    digests = run.processes.broadcast(lambda: json.dumps(stage_digests(run.spec, run.revisions)))
    run.digests |= json.loads(digests)
    if run.store.size(SPEC) is None:
        raise SetupError(
            f"process {run.processes.index} does not see what process 0 wrote to {run.store.uri}: "
            "`output` must be a bucket, or a folder that all machines share"
        )


def _lead_preflight(run: Run, *, resumed: bool) -> StageRecord:
    started = now()
    earlier = _earlier(run.records)
    run.revisions = resolve_all(run.spec, earlier.revisions)
    outcome = Preflight(
        first_started=earlier.first_started,
        resumes=earlier.resumes + resumed,
        revisions=dict(run.revisions),
    )
    run.store.delete(RESULTS)
    run.outputs = []
    run.put(SPEC, _spec_text(run.spec))
    run.digests["preflight"] = digest([run.environment.model_dump(mode="json"), run.revisions])
    marker = run.record_stage("preflight", started, 0.0, outcome)
    logs.get().info(
        "machine is as the spec asks",
        platform=run.environment.platform,
        devices=run.environment.devices,
        kind=run.environment.device_kind,
        packages=run.environment.packages,
        **({"revisions": dict(run.revisions)} if run.revisions else {}),
    )
    if run.spec.reference is not None:
        from job.evals.api_client import missing_key

        if missing := missing_key(run.spec.reference):
            logs.get().warning(missing)
    return marker


def _spec_text(spec: Spec) -> bytes:
    body = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"# The spec as it was run, with overrides and defaults.\n{body}".encode()


def _run_stages(
    run: Run, to_do: Sequence[Stage], wanted: Sequence[str], keep: Callable[[], None]
) -> None:
    for stage in STAGES:
        if stage.name not in wanted:
            break
        _enter(stage.name)
        if stage not in to_do:
            logs.get().info("skipped: done before with the same inputs")
            continue
        run.coordinated_stop.check()
        for name in (*dependents(stage.name), stage.name):
            run.store.delete(f"stages/{name}.json")
            run.records.pop(name, None)
        logs.get().info("stage started")
        started, clock = now(), time.monotonic()
        run.outputs = []
        if stage.everywhere or run.processes.is_primary:
            outcome = stage.run(run)
            seconds = time.monotonic() - clock
            run.record_stage(stage.name, started, seconds, outcome)
            if stage.name == "report":
                write_results(run)
            logs.get().info("stage done", seconds=round(seconds, 1))
            keep()
        made = run.processes.broadcast(partial(_marker_text, run, stage), run.stop.check)
        run.records[stage.name] = StageRecord.model_validate_json(made)


def _marker_text(run: Run, stage: Stage) -> str:
    return run.records[stage.name].model_dump_json()


def _say_skipped(wanted: Sequence[str]) -> None:
    for name in wanted:
        structlog.contextvars.bind_contextvars(stage=name)
        logs.get().info("skipped: done before with the same inputs")


def _say_end(store: Store, reported: bool) -> None:
    """The last lines: the verdict, and where things are."""
    structlog.contextvars.unbind_contextvars("stage")
    log = logs.get()
    results = read_results(store) if reported else None
    if results is None:
        log.info("stopped before the report, as asked", run=store.uri)
        return
    log.info(f"verdict: {results.verdict.sentence}")
    for what, key in (
        ("results", RESULTS),
        ("report", "report.html"),
        ("adapter", "adapter/adapter.lora.h5"),
    ):
        log.info(f"{what}: {child_uri(store.uri, key)}")
