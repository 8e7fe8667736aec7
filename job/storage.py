"""Where a run is kept: a local folder or a Cloud Storage bucket, behind one interface.

Keys are relative POSIX paths. A write is whole or absent: locally through a temporary file
that is synced and renamed, in a bucket because an object appears only once it is complete.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from job.errors import EnvironmentProblem, StageError, UsageError

if TYPE_CHECKING:
    from google.cloud.storage import Bucket

_CHUNK = 8 * 1024 * 1024
_TEMPORARY = ".partial-"


class Store(Protocol):
    """A tree of files under one URI."""

    @property
    def uri(self) -> str:
        """Where the tree is: an absolute path or gs://bucket/prefix."""

    def read(self, key: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Write a whole file, replacing what was there."""

    def download(self, key: str, path: Path) -> bool:
        """Copy a file to a local path; False where there is none."""

    def upload(self, path: Path, key: str) -> None:
        """Copy a local file in, replacing what was there."""

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
        self.download = store.download
        self.size = store.size
        self.list = store.list

    def write(self, key: str, content: bytes) -> None:
        """Does nothing."""

    def upload(self, path: Path, key: str) -> None:
        """Does nothing."""

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

    def _replace(self, key: str, fill: Any) -> None:
        """Fill a temporary file beside the target, sync it, and rename it into place."""
        target = self._path(key)
        partial = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)
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

    def download(self, key: str, path: Path) -> bool:
        source = self._path(key)
        if not source.is_file():
            return False
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
            if path.is_file() and not path.name.startswith(_TEMPORARY):
                yield path.relative_to(self.root).as_posix()

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StageError(f"cannot remove {self._path(key)}: {error.strerror}") from error


class BucketStore:
    """A prefix of a Cloud Storage bucket; the client retries what may be retried.

    Credentials are the environment's (application default credentials); with
    `STORAGE_EMULATOR_HOST` set, that server is used without any.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        if not bucket:
            raise UsageError("a gs:// URI needs a bucket: gs://bucket/prefix")
        self._name = bucket
        self._prefix = prefix
        self._bucket: Bucket | None = None

    @property
    def uri(self) -> str:
        return f"gs://{self._name}/{self._prefix}".rstrip("/")

    def _handle(self) -> "Bucket":
        if self._bucket is None:
            from google.auth.exceptions import DefaultCredentialsError
            from google.cloud import storage

            try:
                client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
            except DefaultCredentialsError as error:
                raise EnvironmentProblem(
                    f"no Google Cloud credentials for {self.uri}: run `gcloud auth "
                    "application-default login`, or run on a VM with a service account"
                ) from error
            self._bucket = client.bucket(self._name)
        return self._bucket

    def _blob(self, key: str) -> Any:
        check_key(key)
        blob = self._handle().blob(f"{self._prefix}/{key}" if self._prefix else key)
        blob.chunk_size = _CHUNK
        return blob

    def _guard(self, action: str, key: str, call: Any) -> Any:
        """Run one request; what is missing is None, a refusal names the object and the way out."""
        from google.api_core import exceptions
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption

        place = f"{self.uri}/{key}"
        try:
            return call()
        except exceptions.NotFound as error:
            if "bucket does not exist" in str(error).lower():
                raise EnvironmentProblem(
                    f"there is no bucket gs://{self._name}; create it first"
                ) from error
            if action == "write":
                raise StageError(f"cannot write {place}: the upload was lost") from error
            return None
        except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
            raise EnvironmentProblem(
                f"not allowed to {action} {place}: the account in use needs "
                "roles/storage.objectUser on the bucket"
            ) from error
        except (exceptions.GoogleAPIError, DataCorruption, OSError) as error:
            raise StageError(f"cannot {action} {place}: {error}") from error

    def read(self, key: str) -> bytes | None:
        content: bytes | None = self._guard(
            "read", key, lambda: self._blob(key).download_as_bytes(checksum="auto")
        )
        return content

    def write(self, key: str, content: bytes) -> None:
        blob = self._blob(key)
        self._guard("write", key, lambda: blob.upload_from_string(content, checksum="crc32c"))

    def upload(self, path: Path, key: str) -> None:
        blob = self._blob(key)
        self._guard("write", key, lambda: blob.upload_from_filename(str(path), checksum="crc32c"))

    def download(self, key: str, path: Path) -> bool:
        if self.size(key) is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = self._blob(key)
        self._guard("read", key, lambda: blob.download_to_filename(str(path), checksum="auto"))
        return True

    def size(self, key: str) -> int | None:
        def stat() -> int | None:
            blob = self._blob(key)
            blob.reload()
            return int(blob.size)

        size: int | None = self._guard("read", key, stat)
        return size

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self._prefix}/" if self._prefix else ""

        def names() -> list[str]:
            blobs = self._handle().client.list_blobs(self._name, prefix=root + prefix)
            return sorted(blob.name.removeprefix(root) for blob in blobs)

        found: list[str] | None = self._guard("list", prefix, names)
        if found is None:
            raise EnvironmentProblem(f"there is no bucket gs://{self._name}; create it first")
        return found

    def delete(self, key: str) -> None:
        blob = self._blob(key)
        self._guard("delete", key, blob.delete)
