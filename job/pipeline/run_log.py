"""`logs/job.jsonl` of a run, saved however the run ends."""

import contextlib
from pathlib import Path
from typing import TextIO

from job.errors import JobError, SetupError
from job.pipeline.layout import LOG
from job.storage.base import Store
from job.storage.local import LocalStore


class RunLog:
    """The log of a run: appended to in a local folder, uploaded to a bucket.

    Nothing may be written before the spec and the environment are checked, so lines wait in memory
    until `open`, which only the primary process calls.
    """

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: TextIO | None = None
        self._store: Store | None = None
        self._path = Path()

    def open(self, store: Store, work: Path) -> None:
        """Write the lines so far, and all later ones, to the log file of a run.

        Args:
            store: of the run.
            work: a scratch folder.

        Raises:
            SetupError: the folder cannot be written to.
        """
        if isinstance(store, LocalStore):
            self._path = store.root / LOG
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"cannot write to {store.uri}: {error.strerror}; choose another --output"
                ) from error
        else:
            self._store, self._path = store, work / "job.jsonl"
            store.download(LOG, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            self.write(line)

    def write(self, line: str) -> None:
        """Add one line, with its line break."""
        if self._file is None:
            self._waiting.append(line)
        else:
            with contextlib.suppress(OSError):  # a full disk: its error must not be hidden here
                self._file.write(line)
                self._file.flush()

    def save(self) -> None:
        """Make the lines so far durable."""
        if self._store is not None:
            self._store.upload(self._path, LOG)

    def close(self) -> None:
        """Save the lines so far; later lines go to the terminal only."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        with contextlib.suppress(JobError):
            self.save()
