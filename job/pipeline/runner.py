"""`job run`: the stages in order, each skipped, run again, or resumed.

A stage is a function of some sections of the spec and of the stages it needs. Its record, written
last, holds the digest of those inputs and the files it wrote. A stage whose record matches is
skipped. Any other stage runs, and so does everything that depends on it, because those records
are deleted first.
"""

import contextvars
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from job.adapters.keras_format import H5
from job.errors import JobError, RunStoppedError, SetupError, StageError, UsageError
from job.machine import devices
from job.machine.distributed import ProcessGroup, join_processes
from job.pipeline import layout
from job.pipeline.preflight import (
    check_local_inputs,
    check_model_files,
    check_run_id,
    run_preflight,
)
from job.pipeline.run import Run, StageRecord, artifact_of, hold_run_lease, now, read_results
from job.pipeline.run_log import RunLog
from job.pipeline.stages import NAMES, STAGES, Stage, dependents, stage_digests
from job.pipeline.status import RunStatus, read_run_status
from job.results import Results
from job.runtime import logs
from job.runtime.signals import STOP
from job.runtime.watchdog import WATCHDOG
from job.spec.load import LoadedSpec
from job.storage.base import ReadOnlyStore, Store
from job.storage.local import LocalStore
from job.storage.locations import (
    cache_folder,
    child_uri,
    free_space,
    is_disk_full,
    open_store,
)


def run_job(
    loaded: LoadedSpec,
    *,
    run_id: str | None = None,
    until: str | None = None,
    fresh: bool = False,
) -> None:
    """Run all stages that are not up to date, through `until`.

    Args:
        loaded: the spec.
        run_id: name of the run; by default it follows from the spec.
        until: last stage to run.
        fresh: delete the outputs of an earlier run first.

    Raises:
        JobError: with the exit code of what went wrong.
        RunStoppedError: stopped early; the same command resumes.
    """
    identity = check_run_id(run_id, loaded.spec)
    if until is not None and until not in NAMES:
        raise UsageError(
            f"--until {until}: there is no such stage; write one of {', '.join(NAMES)}"
        )
    check_local_inputs(loaded.spec)
    stages = NAMES[: NAMES.index(until) + 1] if until else NAMES
    log = RunLog()
    logs.configure(log.write)
    structlog.contextvars.bind_contextvars(run_id=identity)
    _enter_stage("preflight")
    stall_minutes = loaded.spec.runtime.stall_minutes
    with WATCHDOG.watching(stall_minutes, lambda code, why: STOP.leave(code, why)):
        _run_stale(loaded, identity, stages, log, fresh=fresh)


def _run_stale(
    loaded: LoadedSpec, run_id: str, names: Sequence[str], log: RunLog, *, fresh: bool
) -> None:
    """Join the other processes, check the machine, and run the requested stages that are stale."""
    spec = loaded.spec
    processes = join_processes(spec.runtime)
    store = _open_store(child_uri(spec.output, run_id), processes)
    context = contextvars.copy_context()  # log lines of other threads name run and process
    STOP.leave = lambda code, why: context.run(processes.leave, code, why)

    def read_status() -> RunStatus:
        return read_run_status(spec, store, fresh=fresh)

    with processes.exit_together():
        status = RunStatus.model_validate_json(
            processes.broadcast(lambda: read_status().model_dump_json())
        )
        requested = [stage for stage in STAGES if stage.name in names]
        stale = [stage for stage in requested if stage.name in status.stale]
        if not stale and "preflight" in status.records:
            for name in names:
                structlog.contextvars.bind_contextvars(stage=name)
                logs.get().info("stage skipped: up to date")
            _log_end(store, requested)
            return
        to_do = [stage.name for stage in stale]
        logs.get().info("job started", spec=loaded.source, run=store.uri, to_do=to_do)
        try:
            environment = devices.start(spec)
        except SetupError as error:
            logs.get().error("environment check failed", error=str(error))
            raise
        if any(stage.on_all_processes for stage in stale):
            check_model_files(spec)
        with tempfile.TemporaryDirectory(prefix="job-") as work:
            run = Run(
                run_id, spec, store, Path(work), STOP, environment, processes,
                records=status.records,
            )  # fmt: skip
            with STOP.graceful(), hold_run_lease(run, lambda: read_status() == status):
                if fresh:
                    _delete_outputs(store)
                resumed = bool(status.records) and not status.complete
                _run_logged(run, requested, stale, log, resumed=resumed)


def _open_store(uri: str, processes: ProcessGroup) -> Store:
    """Return the run's store; only the primary process writes to it, and logs in full."""
    store = open_store(uri)
    if processes.is_primary:
        return store
    structlog.contextvars.bind_contextvars(process=processes.index)
    logs.configure(least=logging.WARNING)
    return ReadOnlyStore(store)


def _run_logged(
    run: Run, requested: Sequence[Stage], stale: Sequence[Stage], log: RunLog, *, resumed: bool
) -> None:
    """Run the stages, and save the log however they end."""
    if run.processes.is_primary:
        log.open(run.store, run.work)

    def before_exit() -> None:
        STOP.muted = True  # the last writes must not be stopped themselves
        log.save()
        if run.lease is not None:
            run.lease.release()

    run.processes.before_exit = before_exit
    try:
        run_preflight(run, resumed=resumed)
        for stage in requested:
            _enter_stage(stage.name)
            if stage in stale:
                _run_stage(run, stage, log.save)
            else:
                logs.get().info("stage skipped: up to date")
        _log_end(run.store, requested)
    except RunStoppedError as stopped:
        logs.get().warning(str(stopped))
        raise
    except Exception as error:
        explained = _explain(error, run)
        if explained is error:
            raise
        raise explained from error
    finally:
        log.close()


def _log_end(store: Store, requested: Sequence[Stage]) -> None:
    """Log the verdict, and where the results, the report and the adapter are."""
    structlog.contextvars.unbind_contextvars("stage")
    log = logs.get()
    results = read_results(store) if STAGES[-1] in requested else None  # the report
    if results is None:
        log.info("stopped before the report, as requested", run=store.uri)
        return
    log.info(f"verdict: {results.verdict.sentence}")
    for what, key in (
        ("results", layout.RESULTS),
        ("report", layout.REPORT_HTML),
        ("adapter", layout.ADAPTER + H5),
    ):
        log.info(f"{what}: {child_uri(store.uri, key)}")


def _run_stage(run: Run, stage: Stage, save_log: Callable[[], None]) -> None:
    """Run one stage and record it; every process ends up with the record."""
    run.coordinated_stop.check()
    for name in (*dependents(stage.name), stage.name):
        run.store.delete(layout.stage_record(name))
        run.records.pop(name, None)
    logs.get().info("stage started")
    started, clock = now(), time.monotonic()
    run.outputs = []
    if stage.on_all_processes or run.processes.is_primary:
        outcome = stage.run(run)
        seconds = time.monotonic() - clock
        if run.processes.is_primary:
            _check_unchanged(run, stage)
        run.record_stage(stage.name, started, seconds, outcome)
        if stage.name == "report":
            _write_results(run)
        logs.get().info("stage done", seconds=round(seconds, 1))
        save_log()
    record = run.processes.broadcast(
        lambda: run.records[stage.name].model_dump_json(), run.stop.check
    )
    run.records[stage.name] = StageRecord.model_validate_json(record)


def _check_unchanged(run: Run, stage: Stage) -> None:
    """Refuse the result of a stage whose local files changed while the job ran."""
    if stage_digests(run.spec, run.revisions)[stage.name] != run.digests[stage.name]:
        raise UsageError(
            f"a local file that stage {stage.name} depends on (data, model, chat template or "
            "metric) changed while the job ran; run the command again: the stages that read it "
            "are repeated"
        )


def _write_results(run: Run) -> None:
    """Write the last file of a run: the report's results, with every file and its checksum."""
    results = run.outcome("report", Results)
    seconds = results.run.stage_seconds | {"report": run.records["report"].seconds}
    keys = [layout.stage_record(name) for name in NAMES]
    contents = [(key, run.store.read(key)) for key in keys]
    timing = {
        "finished": now(),
        "stage_seconds": seconds,
        "seconds": round(sum(seconds.values()), 3),
    }
    complete = results.model_copy(
        update={
            "artifacts": [
                *(item for name in NAMES for item in run.records[name].outputs),
                *(artifact_of(key, content) for key, content in contents if content is not None),
            ],
            "run": results.run.model_copy(update=timing),
        }
    )
    run.commit(layout.RESULTS, complete.model_dump_json(indent=2).encode())


def _explain(error: Exception, run: Run) -> JobError | RunStoppedError:
    """Log an exception, and return the error to raise for it."""
    if gone := run.processes.peer_error(error):
        logs.get().error(str(gone), error=repr(error))
        return gone
    if is_disk_full(error):
        disks = {"TMPDIR": run.work, "JOB_CACHE": cache_folder()}
        if isinstance(run.store, LocalStore):
            disks["output"] = run.store.root
        error = StageError(
            f"a disk is full ({error}); free are {free_space(disks)}; make room, or set "
            "another folder, and run the same command to resume"
        )
    if isinstance(error, JobError):
        logs.get().error("stage failed", error=str(error))
        return error
    logs.get().error("stage failed", error=repr(error), traceback=traceback.format_exc())
    return StageError(
        f"unexpected {type(error).__name__}: {error}; this is a bug, and its traceback "
        f"is in {child_uri(run.store.uri, layout.LOG)}"
    )


def _enter_stage(name: str) -> None:
    """Let log lines and the watchdog name this stage from now on."""
    structlog.contextvars.bind_contextvars(stage=name)
    WATCHDOG.stage = name
    WATCHDOG.beat()


def _delete_outputs(store: Store) -> None:
    """Delete the outputs of an earlier run, its results first, and nothing else."""
    keys = (key for key in store.list() if key.startswith(layout.OWNED))
    for key in sorted(keys, key=lambda k: (k != layout.RESULTS, not k.startswith(layout.STAGES))):
        store.delete(key)
