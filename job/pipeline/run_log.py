"""`logs/job.jsonl` of a run, saved however the run ends."""

import contextlib
from pathlib import Path

from job.errors import JobError, SetupError
from job.pipeline.layout import LOG
from job.runtime import logs
from job.storage.base import Store
from job.storage.local import LocalStore


class RunLogFile:
    """The log file of a run: appended to in a local folder, uploaded to a bucket."""

    def __init__(self, store: Store, run_log: logs.RunLog, work: Path) -> None:
        """Open the file and send all log lines to it, the earlier ones first.

        Args:
            store: of the run.
            run_log: buffers lines until a file is attached.
            work: a scratch folder.

        Raises:
            SetupError: the folder cannot be written to.
        """
        self._store = store
        self._run_log = run_log
        if isinstance(store, LocalStore):
            self._path = store.root / LOG
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"cannot write to {store.uri}: {error.strerror}; choose another --output"
                ) from error
        else:
            self._path = work / "job.jsonl"
            store.download(LOG, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        run_log.attach(self._file)

    def save(self) -> None:
        """Make the lines so far durable."""
        self._file.flush()
        if not isinstance(self._store, LocalStore):
            self._store.upload(self._path, LOG)

    def close(self) -> None:
        """Save the lines so far; later lines go to the terminal only."""
        self._run_log.detach()
        self._file.close()
        if not isinstance(self._store, LocalStore):
            with contextlib.suppress(JobError):
                self._store.upload(self._path, LOG)
