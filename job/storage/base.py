"""The interface of a store of files, and what its implementations share.

Keys are relative POSIX paths. A write is complete or absent.
"""

import hashlib
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from job.errors import StageError

PARTIAL = ".partial-"
"""Start of the names of partial downloads and unfinished writes."""


@dataclass(frozen=True)
class Stat:
    """Metadata of a file; `version` changes with every write."""

    bytes: int
    version: str
    modified: float
    """The time of the last write in seconds, by the clock of the store."""


class Store(Protocol):
    """A tree of files under one URI."""

    @property
    def uri(self) -> str:
        """The address of the tree: an absolute path or gs://bucket/prefix."""

    def read(self, key: str) -> bytes | None:
        """Return the content of a file, or None if there is no such file."""

    def write(self, key: str, content: bytes) -> None:
        """Write a file, replacing an existing one."""

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        """Write a file, or remove it (content None), if it still has this version (None: absent).

        Returns:
            The new version; "" after a removal; None if the file has another version.
        """

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        """Return the content of a file and its version, for `write_if_version`."""

    def stat(self, key: str) -> Stat | None:
        """Return the metadata of a file, or None if there is no such file."""

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        """Copy a file to a local path; return False if there is none, or none of that version."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file into the store, replacing an existing one."""

    def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Remove a file, if there is one."""


def check_key(key: str) -> str:
    """Return `key` if it is a relative path that stays inside the tree.

    Raises:
        StageError: the key is absolute, empty, or has '..'.
    """
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
        raise StageError(f"'{key}' is not a relative path inside the folder")
    return key


def check_writable(store: Store) -> None:
    """Check that files of a store can be written, replaced and deleted.

    Raises:
        SetupError: the store does not allow it.
    """
    probe = f".probe-{uuid.uuid4().hex}"
    store.write(probe, b"written")
    store.write(probe, b"replaced")
    store.delete(probe)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ReadOnlyStore:
    """A view of a store whose writes and deletions have no effect."""

    def __init__(self, store: Store) -> None:
        self.uri = store.uri
        self.read = store.read
        self.read_version = store.read_version
        self.stat = store.stat
        self.download = store.download
        self.list = store.list

    def _ignore(self, *_arguments: object, **_options: object) -> None:
        """Do nothing."""

    write = upload = write_if_version = delete = _ignore
