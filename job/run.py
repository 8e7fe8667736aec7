"""What a stage is given: the spec, the run's store, a scratch folder, the machine, the model.

Stages talk to each other only through the files of the run and through the outcomes kept in
their markers, both reached from here.
"""

import contextlib
import hashlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from job.errors import Interrupted, StageError
from job.results import Artifact, EnvironmentInfo
from job.spec import Spec
from job.storage import Store, file_sha256

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from job.model.language_model import LanguageModel

Outcome = TypeVar("Outcome", bound=BaseModel)


class StopSignal:
    """SIGTERM and SIGINT, turned into `Interrupted` at a moment when it does no harm.

    By default that is at once: every file is written whole or not at all. Code that has
    something to keep defers it, looks at `requested`, saves, and calls `check`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._deferred = 0

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        repeated = self.requested is not None
        self.requested = signal.Signals(number).name
        if not self._deferred or (repeated and number == signal.SIGINT):
            self.check()

    def check(self) -> None:
        """Raise if a stop was requested."""
        if self.requested:
            raise Interrupted(f"stopped by {self.requested}; run the same command to go on")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a signal only sets `requested`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1


class Marker(BaseModel):
    """`stages/<stage>.json`: the stage was finished with these inputs and left these files."""

    stage: str
    digest: str
    outputs: list[Artifact]
    started: str
    seconds: float
    outcome: dict[str, object]


class Preflight(BaseModel):
    """The outcome of the preflight stage: the machine, and how often the run was started."""

    environment: EnvironmentInfo
    first_started: str
    starts: int


@dataclass
class Run:
    """One run: its identity, where it is kept, and what it needs to go on."""

    id: str
    spec: Spec
    store: Store
    work: Path
    """A scratch folder of this process; nothing in it outlives it."""
    stop: StopSignal
    mesh_of: "Callable[[], Mesh]"
    markers: dict[str, Marker] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of the inputs of each stage, this spec's."""
    written: list[Artifact] = field(default_factory=list)
    """The files that the stage at work has put into the run."""
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

    def model(self) -> "LanguageModel":
        """The model of the spec, loaded once a process."""
        if self._model is None:
            from job.model.language_model import load

            self._model = load(self.spec.model, self.spec.seed, self.mesh_of())
        return self._model

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
