"""job.storage.base."""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from job.errors import StageError


@dataclass(frozen=True)
class Stat:
    """What a store says about a file; `version` changes with every write."""

    bytes: int
    version: str


class Store(Protocol):
    """A tree of files under one URI."""

    @property
    def uri(self) -> str:
        """Where the tree is: an absolute path or gs://bucket/prefix."""

    def read(self, key: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Write a whole file, replacing what was there."""

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        """Write a file, or remove it (None), if it still is of this version (None: absent).

        Returns the new version, an empty one of what was removed, None where it was not.
        """

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        """The content of a file and its version, for `swap`."""

    def stat(self, key: str) -> Stat | None:
        """What is known of a file, or None where there is none."""

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        """Copy a file to a local path; False where there is none, or none of that version."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file in, replacing what was there."""

    def take(self, path: Path, key: str) -> None:
        """Move a local file in, replacing what was there."""

    def size(self, key: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all files whose key begins with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""


def check_key(key: str) -> str:
    """`key` itself, if it is a relative path that stays inside the tree.

    Raises:
        StageError: the key is absolute, empty, or climbs out with '..'.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
        raise StageError(f"'{key}' is not a path inside the run's folder")
    return key


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ReadOnlyStore:
    """Another store that is only read: what is written or deleted here has no effect."""

    def __init__(self, store: Store) -> None:
        self.uri = store.uri
        self.read = store.read
        self.read_version = store.read_version
        self.stat = store.stat
        self.download = store.download
        self.size = store.size
        self.list = store.list

    def write(self, key: str, content: bytes) -> None:
        """Does nothing."""

    def upload(self, path: Path, key: str) -> None:
        """Does nothing."""

    def take(self, path: Path, key: str) -> None:
        """Removes the local file."""
        path.unlink()

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        """Does nothing, and says that it could not."""

    def delete(self, key: str) -> None:
        """Does nothing."""


PARTIAL = ".partial-"
"""Begins the names of files that are not whole yet."""
