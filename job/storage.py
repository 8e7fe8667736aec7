"""Where a run is kept: a local folder or a Cloud Storage bucket, behind one interface.

Keys are relative POSIX paths. A write is whole or absent: locally through a temporary file
that is synced and renamed, in a bucket because an object appears only once it is complete.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from job.errors import EnvironmentProblem, StageError, UsageError
from job.partial import PARTIAL


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

    def swap(self, key: str, content: bytes | None, version: str | None) -> str | None:
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


def open_store(uri: str) -> Store:
    """The store at a local path or a gs://bucket/prefix URI; nothing is created yet."""
    if uri.startswith("gs://"):
        name, _, prefix = uri.removeprefix("gs://").partition("/")
        from job.bucket import BucketStore

        return BucketStore(name, prefix.strip("/"))
    if "://" in uri:
        raise UsageError(f"'{uri}' is neither a local folder nor gs://bucket/prefix")
    return LocalStore(Path(uri))


def child_uri(uri: str, name: str) -> str:
    """The URI of `name` inside `uri`."""
    return f"{uri.rstrip('/')}/{name}" if uri.startswith("gs://") else str(Path(uri) / name)


def read_uri(uri: str) -> bytes:
    """The content of one object, by its full gs:// URI.

    Raises:
        UsageError: there is no such object.
    """
    parent, _, key = uri.rpartition("/")
    if not key or parent in ("gs:/", "gs:"):
        raise UsageError(f"'{uri}' names no object; write gs://bucket/path")
    content = open_store(parent).read(key)
    if content is None:
        raise UsageError(f"there is no object {uri}")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ReadingStore:
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

    def swap(self, key: str, content: bytes | None, version: str | None) -> str | None:
        """Does nothing, and says that it could not."""

    def delete(self, key: str) -> None:
        """Does nothing."""


class LocalStore:
    """A folder of the local file system; missing folders are made when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def uri(self) -> str:
        return str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def read(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StageError(f"cannot read {self._path(key)}: {error.strerror}") from error

    def write(self, key: str, content: bytes) -> None:
        def fill(target: Path) -> None:
            with target.open("wb") as file:
                file.write(content)

        self._replace(key, fill)

    def upload(self, path: Path, key: str) -> None:
        self._replace(key, lambda target: shutil.copyfile(path, target))

    def take(self, path: Path, key: str) -> None:
        self._replace(key, lambda target: shutil.move(path, target))

    def _replace(self, key: str, fill: Any) -> None:
        """Fill a temporary file beside the target, sync it, and rename it into place."""
        target = self._path(key)
        partial = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=target.parent)
            os.close(handle)
            partial = Path(name)
            fill(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(target)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StageError(f"cannot write {target}: {reason}") from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    def read_version(self, key: str) -> tuple[bytes, str] | None:
        content = self.read(key)
        return None if content is None else (content, hashlib.sha256(content).hexdigest())

    def swap(self, key: str, content: bytes | None, version: str | None) -> str | None:
        with self._locked(key):
            found = self.read_version(key)
            if (found[1] if found else None) != version:
                return None
            if content is None:
                self.delete(key)
                return ""
            self.write(key, content)
            return hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Alone among all processes that would swap a file of this folder."""
        folder = self._path(key).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise EnvironmentProblem(
                f"cannot write to {folder}: {error.strerror}; choose another --output"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def stat(self, key: str) -> Stat | None:
        path = self._path(key)
        if not path.is_file():
            return None
        found = path.stat()
        return Stat(found.st_size, f"{found.st_mtime_ns}-{found.st_size}")

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        found = self.stat(key)
        if found is None or version not in (None, found.version):
            return False
        source = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        except OSError as error:
            raise StageError(f"cannot copy {source} to {path}: {error.strerror}") from error
        return True

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def list(self, prefix: str = "") -> list[str]:
        return sorted(key for key in self._keys() if key.startswith(prefix))

    def _keys(self) -> Iterator[str]:
        for path in self.root.rglob("*"):
            if path.is_file() and not path.name.startswith(PARTIAL):
                yield path.relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StageError(f"cannot remove {self._path(key)}: {error.strerror}") from error
