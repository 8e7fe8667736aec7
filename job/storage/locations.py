"""Where files are: URIs of stores (a local path or gs://bucket/path), and the cache folder."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from job.errors import SetupError, UsageError
from job.storage.base import Store
from job.storage.local import LocalStore


def open_store(uri: str) -> Store:
    """Return the store at a local path or a gs://bucket/prefix URI; nothing is created yet."""
    if uri.startswith("gs://"):
        name, _, prefix = uri.removeprefix("gs://").partition("/")
        from job.storage.gcs import GcsStore

        return GcsStore(name, prefix.strip("/"))
    if "://" in uri:
        raise UsageError(f"'{uri}' is neither a local folder nor gs://bucket/prefix")
    return LocalStore(Path(uri))


def child_uri(uri: str, name: str) -> str:
    """Return the URI of `name` inside `uri`."""
    return f"{uri.rstrip('/')}/{name}" if uri.startswith("gs://") else str(Path(uri) / name)


def read_uri(uri: str) -> bytes:
    """Return the content of one object by its full gs:// URI.

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


def ensure_home() -> None:
    """Set HOME to a private temporary folder if this user has no home; libraries look for one.

    Raises:
        SetupError: another user owns that folder, or it cannot be written.
    """
    with contextlib.suppress(RuntimeError):
        Path.home()
        return
    folder = Path(tempfile.gettempdir(), f"job-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.lstat().st_uid == os.getuid()
    except OSError:
        is_ours = False
    if not is_ours:
        raise SetupError(f"this user has no home, and {folder} cannot be used; set HOME")
    os.environ["HOME"] = str(folder)


def cache_folder(*parts: str) -> Path:
    """Return a folder for files that can be downloaded or computed again.

    It is inside $JOB_CACHE, or inside `job` in the user's cache folder.
    """
    if chosen := os.environ.get("JOB_CACHE"):
        return Path(chosen).joinpath(*parts)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches.joinpath("job", *parts)


_DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is that a disk or a quota is full.

    Some libraries state it in the text of an error of their own.
    """
    while error is not None:
        if any(text in str(error) for text in _DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_space(folders: Mapping[str, Path]) -> str:
    """Describe the free space of folders, by what sets each of them."""
    return ", ".join(
        f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB in {folder} ({setting})"
        for setting, folder in folders.items()
        if folder.is_dir()
    )


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return a folder of the cache; on first use `build` fills a new folder that it is given.

    Other processes see the complete folder or none; the first one to finish wins.

    Raises:
        SetupError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            building = Path(scratch, "building")
            building.mkdir()
            build(building)
            building.replace(folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have built it first
            raise SetupError(
                f"cannot write to the cache {folder.parent}: {error.strerror or error}; set "
                "JOB_CACHE to a writable folder with free space"
            ) from error
    return folder
