"""What a stage is given: the spec, the run's store, a scratch folder, the machine, the model.

Stages talk to each other only through the files of the run and through the outcomes kept in
their markers, both reached from here.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from job.errors import RunStoppedError, StageError
from job.machine.distributed import ProcessGroup
from job.results import Artifact, EnvironmentInfo, Results
from job.runtime.signals import StopSignal
from job.spec.pinning import Revisions
from job.spec.schema import Spec
from job.storage.base import Store, file_sha256
from job.storage.lease import hold_lease

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from job.model.language_model import LanguageModel
    from job.pipeline.background_compile import Ahead


@contextlib.contextmanager
def hold_run_lease(run: "Run", unchanged: Callable[[], bool]) -> Iterator[None]:
    """Hold a run's lease; among several processes the first holds it for all.

    Args:
        unchanged: whether the run is still as it was when what is to be done was decided.

    Raises:
        Interrupted: another process is at work on this run, or was while this one began.
    """
    if not run.processes.is_primary:
        yield
        return

    def lost(why: str) -> None:
        run.stop.requested = why

    with hold_lease(run.store, f"the run {run.id}", lost) as lease:
        run.guard, run.release = lease.check, lease.release
        if not unchanged():
            raise RunStoppedError(
                "another process worked on this run while this one began; "
                "run the same command to go on"
            )
        yield


Outcome = TypeVar("Outcome", bound=BaseModel)


class StageRecord(BaseModel):
    """`stages/<stage>.json`: the stage was finished with these inputs and left these files."""

    stage: str
    digest: str
    outputs: list[Artifact]
    started: str
    seconds: float
    environment: EnvironmentInfo
    """The machine it was finished on."""
    outcome: dict[str, object]


class Preflight(BaseModel):
    """The outcome of the preflight stage: how often the run was started, and what it reads."""

    first_started: str
    resumes: int
    """Times that an unfinished run was started again."""
    revisions: dict[str, str]
    """The commit of each Hub repository (see `job.spec.pinning`)."""


@dataclass
class Run:
    """One run: its identity, where it is kept, and what it needs to go on."""

    id: str
    spec: Spec
    store: Store
    work: Path
    """A scratch folder of this process; nothing in it outlives it."""
    stop: StopSignal
    environment: EnvironmentInfo
    mesh_of: "Callable[[], Mesh]"
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    markers: dict[str, StageRecord] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of the inputs of each stage, this spec's."""
    revisions: Revisions = field(default_factory=dict)
    """The commits of what the spec names on the Hub."""
    previous: StageRecord | None = None
    """The marker of the stage at work, if it was finished with the same inputs before."""
    guard: Callable[[], None] = lambda: None
    """Raises if another process may be at work on this run by now."""
    release: Callable[[], None] = lambda: None
    """Gives the run back, so that another process need not wait for the lease to expire."""
    written: list[Artifact] = field(default_factory=list)
    """The files that the stage at work has put into the run."""
    ahead: "Ahead | None" = None
    """A training whose step is being compiled already."""
    _model: "LanguageModel | None" = None

    def outcome(self, stage: str, kind: type[Outcome]) -> Outcome:
        """What an earlier stage found out.

        Raises:
            StageError: that stage has not been finished.
        """
        marker = self.markers.get(stage)
        if marker is None:
            raise StageError(f"the stage '{stage}' has not been run")
        return kind.model_validate(marker.outcome)

    def check(self) -> None:
        """Raise if a stop was requested of any process; all must check at the same point."""
        if self.processes.any(self.stop.requested is not None):
            self.stop.check()
            raise RunStoppedError("stopped with another process; run the same command to go on")

    def model(self) -> "LanguageModel":
        """The model of the spec, loaded once a process."""
        if self._model is None:
            from job.model.load import load_model

            self._model = load_model(
                self.spec.model, self.spec.seed, self.mesh_of(), self.revisions
            )
        return self._model

    def conclude(self, key: str, content: bytes, *, again: bool = False) -> None:
        """Write a file whose presence means that something is done: a marker, the results.

        Args:
            again: it may be there from an earlier start; otherwise this process removed it.

        Raises:
            Interrupted: another process has written it, or may be at work on this run.
        """
        if not self.processes.is_primary:
            return
        self.guard()
        found = self.store.read_version(key) if again else None
        if self.store.write_if_version(key, content, found[1] if found else None) is None:
            raise RunStoppedError(
                f"another process has written {key} of this run; run the same command to go on"
            )

    def put(self, key: str, content: bytes) -> None:
        """Write a file of the run, as an output of the stage at work."""
        self.store.write(key, content)
        digest = hashlib.sha256(content).hexdigest()
        self.written.append(Artifact(path=key, bytes=len(content), sha256=digest))

    def put_file(self, key: str, path: Path) -> None:
        """The same for a local file, which may be large."""
        self.store.upload(path, key)
        size = path.stat().st_size
        self.written.append(Artifact(path=key, bytes=size, sha256=file_sha256(path)))

    def fetch(self, key: str) -> Path:
        """A local copy of a file of the run.

        Raises:
            StageError: the run has no such file.
        """
        path = self.work / key
        if not self.store.download(key, path):
            raise StageError(f"the run has no file {key}; run it again to make it")
        return path


RESULTS = "results.json"


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def read_results(store: Store) -> Results | None:
    """The results of a whole run; unreadable ones count as absent."""
    content = store.read(RESULTS)
    if content is None:
        return None
    try:
        return Results.model_validate_json(content)
    except ValidationError:
        return None


def write_stage_record(
    run: Run, name: str, started: str, seconds: float, outcome: BaseModel
) -> StageRecord:
    """Mark a stage as finished, with the files it has written.

    Args:
        started: when, as by `now`.
        seconds: how long it took.
        outcome: what it found out.
    """
    marker = StageRecord(
        stage=name,
        digest=run.digests[name],
        outputs=run.written,
        started=started,
        seconds=round(seconds, 3),
        environment=run.environment,
        outcome=outcome.model_dump(mode="json"),
    )
    content = marker.model_dump_json(indent=2).encode()
    run.conclude(f"stages/{name}.json", content, again=name == "preflight")
    run.markers[name] = marker
    return marker
