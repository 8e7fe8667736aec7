"""Files that arrive in parts: a stopped download leaves what it has, and the next begins there."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from job.errors import StageError
from job.pulse import PULSE
from job.retry import Transient, Tries, stop_point

PARTIAL = ".partial-"
"""Begins the names of files that are not whole yet."""

_MISMATCHES = 3
"""Times that a file may come with the wrong content before the source is taken to be wrong."""


class Arriving:
    """A file of `size` bytes that arrives in parts; `have` of them are here."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.have = os.fstat(file.fileno()).st_size
        if self.have > size:
            self.restart()

    def restart(self) -> None:
        """Forget what is here."""
        self._file.truncate(0)
        self.have = 0

    def flush(self) -> None:
        """Let others see what is here."""
        self._file.flush()

    def write(self, piece: bytes) -> int:
        """Add what follows.

        Raises:
            Transient: it is more than there should be.
        """
        stop_point()
        PULSE.beat()
        self._file.write(piece)
        self.have += len(piece)
        if self.have > self.size:
            self.restart()
            raise Transient(f"more bytes came than {self.size}")
        return len(piece)


def bring(
    what: str,
    path: Path,
    *,
    size: int,
    is_right: Callable[[Path], bool],
    append: Callable[[Arriving], None],
) -> None:
    """Bring a file of `size` bytes to `path`, which appears only once `is_right` holds.

    What an interrupted download has got is kept beside it, and the next one goes on there;
    two processes that want the same file take turns.

    Args:
        append: writes what follows the first `have` bytes, as much of it as it can get.

    Raises:
        StageError: the time is up, the disk is full, or the content is wrong every time.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.is_file():  # another process was faster
                partial.unlink(missing_ok=True)
                return
            _fill(what, Arriving(file, size), lambda: is_right(partial), append)
            partial.replace(path)
    except OSError as error:
        raise StageError(f"cannot write {path}: {error.strerror or error}") from error


def _fill(
    what: str,
    file: Arriving,
    is_right: Callable[[], bool],
    append: Callable[[Arriving], None],
) -> None:
    tries, wrong = Tries(what), 0
    while True:
        before = file.have
        try:
            if file.have < file.size:
                append(file)
            if file.have < file.size:
                raise Transient(f"the file ended after {file.have} of {file.size} bytes")
            file.flush()
            if is_right():
                return
            file.restart()
            wrong += 1
            if wrong == _MISMATCHES:
                raise StageError(
                    f"cannot {what}: {wrong} times its content did not have the checksum it "
                    "should have; the file is damaged at its source"
                )
            raise Transient("the content does not have its checksum")
        except Transient as error:
            if file.have > before:
                tries.progress()
            tries.failed(error)
