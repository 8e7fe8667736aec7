"""Verified downloads: a file appears under its name only once its content is right.

A download goes into a scratch folder next to its target. What a killed process leaves there is
never used; the next download of the same file removes it.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import StageError
from job.storage.base import PARTIAL
from job.storage.retry import Attempts, TransientError

_MISMATCHES = 3
"""Wrong contents of a file after which its source is considered damaged."""

_PIECE = 1024 * 1024


@dataclass(frozen=True)
class Content:
    """The expected content of a file; `new_digest` starts a checksum like those of hashlib."""

    size: int
    new_digest: Callable[[], Any]
    digest: bytes

    def matches(self, path: Path) -> bool:
        """Return whether a local file exists and has this content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = self.new_digest()
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        return bool(digest.digest() == self.digest)


def download(what: str, path: Path, content: Content, get: Callable[[Path], Path]) -> None:
    """Download a file to `path`, unless it is there already.

    Args:
        what: completes "cannot ...", for messages.
        get: downloads into an empty folder and returns the file; may raise `TransientError`.

    Raises:
        StageError: the time is up, the disk is full, or the content is wrong every time.
    """
    mismatches = 0

    def attempt(scratch: Path) -> None:
        nonlocal mismatches
        file = get(scratch)
        if content.matches(file):
            file.replace(path)
            return
        size = file.stat().st_size
        file.unlink()
        if size != content.size:
            raise TransientError(f"got {size} of {content.size} bytes")
        mismatches += 1
        if mismatches == _MISMATCHES:
            raise StageError(
                f"cannot {what}: {mismatches} times its content did not have the expected "
                "checksum; the file is damaged at its source"
            )
        raise TransientError("the content does not have the expected checksum")

    try:
        with _scratch_folder(path) as scratch:
            if not content.matches(path):
                Attempts(what).run(lambda: attempt(scratch))
    except OSError as error:
        if error.errno is None:  # not of the file system, but of an HTTP library
            raise
        raise StageError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to `path` that no other process uses; remove it afterwards."""
    folder = path.with_name(PARTIAL + path.name)
    handle = _locked(folder)
    try:
        for item in folder.iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(folder: Path) -> int:
    """Create and lock a folder; return the open handle that holds the lock."""
    while True:
        if folder.is_file():  # a partial download of an earlier version
            folder.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its last user removed it
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(folder.stat(), os.fstat(handle)):
                    return handle
            os.close(handle)
