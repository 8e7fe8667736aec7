"""Files that arrive in parts: a stopped download leaves what it has, and the next begins there."""

import fcntl
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from job.errors import StageError
from job.runtime.threads import AHEAD, Threads
from job.runtime.watchdog import WATCHDOG
from job.storage.base import PARTIAL
from job.storage.retry import Attempts, TransientError, check_stop

_MISMATCHES = 3
"""Times that a file may come with the wrong content before the source is taken to be wrong."""


_PIECE = 1024 * 1024


class Digest(Protocol):
    """A checksum in the making, as those of hashlib."""

    def update(self, piece: bytes, /) -> object:
        """Add what follows."""

    def hexdigest(self) -> str:
        """The checksum of what was added."""


@dataclass(frozen=True)
class Content:
    """What a file should be.

    new_digest: makes a checksum of nothing yet.
    digest: what it should be in the end, in hex.
    """

    size: int
    new_digest: Callable[[], Digest]
    digest: str

    def is_that_of(self, path: Path) -> bool:
        """Whether a local file has this content."""
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return self.read(file).hexdigest() == self.digest

    def read(self, file: BinaryIO) -> Digest:
        """The checksum of the rest of an open file."""
        digest = self.new_digest()
        while piece := file.read(_PIECE):
            digest.update(piece)
        return digest


class Arriving:
    """A file that arrives in parts; `have` of its bytes are here."""

    def __init__(self, file: BinaryIO, content: Content, thread: Threads) -> None:
        """Make it from what the file has.

        Args:
            file: open for appending and reading.
            thread: a single one, which makes the checksum while the next pieces arrive.
        """
        self._file = file
        self._content = content
        self._thread = thread
        self._waiting: deque[Future[object]] = deque()
        file.seek(0)
        self._digest = content.read(file)
        self.have = file.tell()
        if self.have > content.size:
            self.restart()

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._content.size

    @property
    def is_right(self) -> bool:
        """Whether what is here has the checksum of the whole."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest() == self._content.digest

    def restart(self) -> None:
        """Forget what is here."""
        self._file.truncate(0)
        self._waiting.clear()
        self._digest = self._content.new_digest()
        self.have = 0

    def flush(self) -> None:
        """Let others see what is here."""
        self._file.flush()

    def write(self, piece: bytes) -> int:
        """Add what follows.

        Raises:
            Transient: it is more than there should be.
        """
        check_stop()
        WATCHDOG.beat()
        self._file.write(piece)
        if len(self._waiting) == AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._digest.update, piece))
        self.have += len(piece)
        if self.have > self.size:
            self.restart()
            raise TransientError(f"more bytes came than {self.size}")
        return len(piece)


def bring(what: str, path: Path, content: Content, append: Callable[[Arriving], None]) -> None:
    """Bring a file to `path`, where it appears only once its content is right.

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
        with partial.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.is_file():  # another process was faster
                partial.unlink(missing_ok=True)
                return
            with Threads(1) as thread:
                _fill(what, Arriving(file, content, thread), append)
            partial.replace(path)
    except OSError as error:
        raise StageError(f"cannot write {path}: {error.strerror or error}") from error


def _fill(what: str, file: Arriving, append: Callable[[Arriving], None]) -> None:
    tries, wrong = Attempts(what), 0
    while True:
        before = file.have
        try:
            if file.have < file.size:
                append(file)
            if file.have < file.size:
                raise TransientError(f"the file ended after {file.have} of {file.size} bytes")
            if file.is_right:
                file.flush()
                return
            file.restart()
            wrong += 1
            if wrong == _MISMATCHES:
                raise StageError(
                    f"cannot {what}: {wrong} times its content did not have the checksum it "
                    "should have; the file is damaged at its source"
                )
            raise TransientError("the content does not have its checksum")
        except TransientError as error:
            if file.have > before:
                tries.progress()
            tries.failed(error)
