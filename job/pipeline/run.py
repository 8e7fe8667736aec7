"""One run: its spec, its store and scratch folder, the processes at work, the stages done so far.

Stages communicate only through the files of the run and through the outcomes in their records,
and both are reached from here. Rooms below the pipeline never see a `Run`: a stage passes them
values and writes what they return.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from job.errors import RunStoppedError, StageError
from job.evals.predictions import Line, parse_predictions
from job.machine.distributed import CoordinatedStop, ProcessGroup
from job.pipeline import layout
from job.results import Artifact, EnvironmentInfo, Results
from job.runtime.signals import StopSignal
from job.spec.pinning import Revisions
from job.spec.schema import Spec
from job.storage.base import Store, check_writable, file_sha256
from job.storage.lease import Lease, LeaseHeldError

if TYPE_CHECKING:
    from job.model.language_model import LanguageModel


class StageRecord(BaseModel):
    """`stages/<stage>.json`: proof that a stage is done, with its inputs and its outputs."""

    stage: str
    digest: str
    """Digest of the inputs."""
    outputs: list[Artifact]
    started: str
    seconds: float
    environment: EnvironmentInfo
    """The machine the stage ran on."""
    outcome: dict[str, object]


class Preflight(BaseModel):
    """Outcome of the preflight stage: how often the run was started, and what it reads."""

    first_started: str
    resumes: int
    """How often an unfinished run was started again."""
    revisions: dict[str, str]
    """The commit of each Hub repository (see `job.spec.pinning`)."""


@dataclass
class Run:
    """One run as one of its processes sees it."""

    id: str
    spec: Spec
    store: Store
    work: Path
    """A scratch folder of this process, removed when it ends."""
    stop: StopSignal
    environment: EnvironmentInfo
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    records: dict[str, StageRecord] = field(default_factory=dict)
    """Records of the stages that are done, by name."""
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of the inputs of each stage, for this spec."""
    revisions: Revisions = field(default_factory=dict)
    """The commit of each Hub repository that the spec names."""
    lease: Lease | None = None
    """The lease of the run, in the process that writes."""
    outputs: list[Artifact] = field(default_factory=list)
    """Files that the current stage has written."""
    _model: "LanguageModel | None" = None

    def outcome[Outcome: BaseModel](self, stage: str, kind: type[Outcome]) -> Outcome:
        """Return the outcome of an earlier stage.

        Raises:
            StageError: that stage is not done.
        """
        record = self.records.get(stage)
        if record is None:
            raise StageError(f"the stage '{stage}' has not been run")
        return kind.model_validate(record.outcome)

    @property
    def coordinated_stop(self) -> CoordinatedStop:
        """The stop request, for loops that all processes run in step."""
        return CoordinatedStop(self.stop, self.processes)

    def model(self) -> "LanguageModel":
        """Return the model of the spec, loaded once per process."""
        if self._model is None:
            from job.machine.devices import make_mesh
            from job.model.load import load_model

            mesh = make_mesh(self.spec.runtime)
            self._model = load_model(self.spec.model, self.spec.seed, mesh, self.revisions)
        return self._model

    def commit(self, key: str, content: bytes, *, replace: bool = False) -> None:
        """Write a file whose presence means that something is done: a record, the results.

        Args:
            replace: the file may be there from an earlier start; otherwise it must be absent.

        Raises:
            RunStoppedError: another process has written it, or may be at work on this run.
        """
        if not self.processes.is_primary:
            return
        if self.lease is not None:
            self.lease.check()
        current = self.store.read_version(key) if replace else None
        version = current[1] if current else None
        if self.store.write_if_version(key, content, version) is None:
            raise RunStoppedError(
                f"another process has written {key} of this run; run the same command to resume"
            )

    def put(self, key: str, content: bytes) -> Artifact:
        """Write a file of the run, as an output of the current stage."""
        self.store.write(key, content)
        return self._add_output(artifact_of(key, content))

    def put_file(self, key: str, path: Path) -> Artifact:
        """Copy a local file, which may be large, into the run as an output of the stage."""
        self.store.upload(path, key)
        size = path.stat().st_size
        return self._add_output(Artifact(path=key, bytes=size, sha256=file_sha256(path)))

    def _add_output(self, artifact: Artifact) -> Artifact:
        self.outputs.append(artifact)
        return artifact

    def fetch(self, key: str) -> Path:
        """Return a local copy of a file of the run.

        Raises:
            StageError: the run has no such file, or not the one that its stage wrote.
        """
        path = self.work / key
        if not self.store.download(key, path):
            raise StageError(f"the run has no file {key}; run it again to make it")
        self._check_content(key, file_sha256(path))
        return path

    def read(self, key: str) -> bytes | None:
        """Return the content of a file of the run, or None if there is no such file.

        Raises:
            StageError: a stage wrote it, and it is missing or another one now.
        """
        content = self.store.read(key)
        self._check_content(key, None if content is None else hashlib.sha256(content).hexdigest())
        return content

    def predictions[L: Line](self, model: str, name: str, kind: type[L]) -> list[L]:
        """Return the predictions of a model on an evaluation; empty if there are none.

        Raises:
            StageError: the file is not the one that its stage wrote.
        """
        content = self.read(layout.predictions(model, name))
        return [] if content is None else parse_predictions(content, kind)

    def _check_content(self, key: str, sha256: str | None) -> None:
        """Check a file against the record of the stage that wrote it; None is a missing file."""
        for record in self.records.values():
            if any(item.path == key and item.sha256 != sha256 for item in record.outputs):
                wrong = "is missing" if sha256 is None else "does not have its checksum: delete it"
                raise StageError(
                    f"{self.store.uri}: the file {key} of stage {record.stage} {wrong}; run the "
                    "command again, which repeats the stage"
                )

    def record_stage(
        self, name: str, started: str, seconds: float, outcome: BaseModel
    ) -> StageRecord:
        """Record a stage as done, with the files it has written.

        Args:
            name: the stage.
            started: when, from `now`.
            seconds: its duration.
            outcome: what later stages read.
        """
        record = StageRecord(
            stage=name,
            digest=self.digests[name],
            outputs=self.outputs,
            started=started,
            seconds=round(seconds, 3),
            environment=self.environment,
            outcome=outcome.model_dump(mode="json"),
        )
        content = record.model_dump_json(indent=2).encode()
        self.commit(layout.stage_record(name), content, replace=name == "preflight")
        self.records[name] = record
        return record


def artifact_of(key: str, content: bytes) -> Artifact:
    """Describe a file of a run."""
    digest = hashlib.sha256(content).hexdigest()
    return Artifact(path=key, bytes=len(content), sha256=digest)


@contextlib.contextmanager
def hold_run_lease(run: Run, unchanged: Callable[[], bool]) -> Iterator[None]:
    """Hold the lease of a run; the primary process holds it for all.

    Args:
        run: the run.
        unchanged: whether the run is still in the state from which the stages to run were chosen.

    Raises:
        RunStoppedError: another process is at work on this run, or was in between.
        SetupError: the store does not let files be replaced or deleted.
    """
    if not run.processes.is_primary:
        yield
        return
    check_writable(run.store)

    def on_lost(reason: str) -> None:
        run.stop.requested = reason

    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(run.store, f"the run {run.id}", on_lost))
        except LeaseHeldError as held:
            raise LeaseHeldError(f"{held}, or use another --run-id") from held
        run.lease = lease
        if not unchanged():
            raise RunStoppedError(
                "another process worked on this run while this one began; "
                "run the same command to resume"
            )
        yield


def now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def read_results(store: Store) -> Results | None:
    """Return the results of a finished run; unreadable ones count as absent."""
    with contextlib.suppress(ValidationError):
        return Results.model_validate_json(store.read(layout.RESULTS) or b"")
    return None
