"""A folder of the local file system as a store."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import SetupError, StageError
from job.storage.base import PARTIAL, Stat, check_key


class LocalStore:
    """A folder and its subfolders, which are created by the first write."""

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
        self._replace(key, lambda target: target.write_bytes(content))

    def upload(self, path: Path, key: str) -> None:
        self._replace(key, lambda target: shutil.copyfile(path, target))

    def _replace(self, key: str, fill: Any) -> None:
        """Fill a temporary file next to the target, sync it, and rename it into place."""
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

    def write_if_version(self, key: str, content: bytes | None, version: str | None) -> str | None:
        with self._locked(key):
            current = self.read_version(key)
            if (current[1] if current else None) != version:
                return None
            if content is None:
                self.delete(key)
                return ""
            self.write(key, content)
            return hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Exclude all other processes that would replace a file of this folder."""
        folder = self._path(key).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise SetupError(
                f"cannot write to {folder}: {error.strerror}; choose another folder"
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
        status = path.stat()
        version = f"{status.st_mtime_ns}-{status.st_size}"
        return Stat(status.st_size, version, status.st_mtime)

    def download(self, key: str, path: Path, version: str | None = None) -> bool:
        stat = self.stat(key)
        if stat is None or version not in (None, stat.version):
            return False
        source = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        except OSError as error:
            raise StageError(f"cannot copy {source} to {path}: {error.strerror}") from error
        return True

    def list(self, prefix: str = "") -> list[str]:
        paths = [path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file()]
        complete = (p for p in paths if not any(part.startswith(PARTIAL) for part in p.parts))
        return sorted(key for path in complete if (key := path.as_posix()).startswith(prefix))

    def delete(self, key: str) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise StageError(f"cannot remove {self._path(key)}: {error.strerror}") from error
