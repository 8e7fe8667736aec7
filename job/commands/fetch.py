"""`job fetch`: download a finished run, with every checksum verified.

Also `open_finished_run` and `read_artifact`, with which other commands read finished runs.
"""

import contextlib
import hashlib
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from job.errors import StageError, UsageError
from job.pipeline.layout import LOGS, OWNED, RESULTS, STAGES
from job.results import Artifact, Results
from job.runtime import logs
from job.runtime.threads import run_all
from job.storage.base import PARTIAL, Store, check_key, file_sha256
from job.storage.local import LocalStore
from job.storage.locations import open_store

_MARKER = f"{PARTIAL}fetch"
"""Holds the run id in a folder whose download has begun."""

_DOWNLOADS = 4
"""Concurrent downloads."""


def _fetch_one(source: Store, target: LocalStore, item: Artifact) -> bool:
    """Download one file unless it is complete already; return whether it was."""
    path = target.root / item.path
    _refuse_links(source, item.path)
    _refuse_links(target, item.path)
    if path.is_file() and path.stat().st_size == item.bytes and file_sha256(path) == item.sha256:
        return True
    if not source.download(item.path, path):
        raise StageError(f"{source.uri}: the file {item.path} is missing")
    if path.stat().st_size != item.bytes or file_sha256(path) != item.sha256:
        path.unlink()
        raise StageError(
            f"{source.uri}: the file {item.path} does not have the checksum in results.json"
        )
    return False


def _refuse_links(store: Store, key: str) -> None:
    """Raise StageError if a file, or a folder it is in, is a symbolic link."""
    if isinstance(store, LocalStore):
        path = store.root
        for part in Path(key).parts:
            path /= part
            if path.is_symlink():
                raise StageError(f"{path} is a symbolic link, which is not followed; remove it")


def _check_listed(uri: str, key: str) -> str:
    """Return the key of a listed file; raise StageError if a run leaves no such file."""
    parts = Path(check_key(key)).parts
    if not key.startswith(OWNED) or any(part.startswith(".") for part in parts):
        raise StageError(f"{uri}: results.json lists {key!r}, which is not a file of a run")
    return key


def _check_target(target: LocalStore, run_id: str) -> None:
    """Prepare a folder: a new one, or that of an earlier fetch of the same run."""
    if target.root.exists() and not target.root.is_dir():
        raise UsageError(f"{target.root} is a file; name a new folder")
    fetched = (target.read(_MARKER) or b"").decode("utf-8", "replace")
    if not fetched and (content := target.read(RESULTS)) is not None:
        with contextlib.suppress(ValidationError):
            fetched = Results.model_validate_json(content).run.id
    if fetched != run_id and target.root.exists() and any(target.root.iterdir()):
        raise UsageError(
            f"{target.root} holds files that are not of an earlier fetch of {run_id}; name a new "
            "folder"
        )
    target.write(_MARKER, run_id.encode())


def fetch_run(uri: str, folder: str) -> None:
    """Download a run to `folder`, except files that are already there with the right checksum.

    `results.json` is written last, so its presence means that the download is complete. The log
    has no checksum: its last lines are written after the results.

    Raises:
        UsageError: there is no finished run at `uri`, or the folder holds something else.
        StageError: a file is missing, does not have its checksum, or is no file of a run.
    """
    logs.configure()
    source, content, results = open_finished_run(uri)
    checked = {_check_listed(uri, item.path): item for item in results.artifacts}
    target = LocalStore(Path(folder))
    _check_target(target, results.run.id)
    if target.read(RESULTS) != content:
        target.delete(RESULTS)
    downloads = [partial(_fetch_one, source, target, item) for item in checked.values()]
    unchanged = sum(run_all(downloads, _DOWNLOADS))
    for key in source.list():
        is_hidden = any(part.startswith(".") for part in Path(key).parts)
        if key not in checked and key.startswith((LOGS, STAGES)) and not is_hidden:
            _refuse_links(source, check_key(key))
            _refuse_links(target, key)
            extra = source.read(key)
            if extra is not None:
                target.write(key, extra)
    target.write(RESULTS, content)
    target.delete(_MARKER)
    logs.get().info(
        "fetched, checksums verified", files=len(checked), unchanged=unchanged, folder=target.uri
    )


def open_finished_run(uri: str) -> tuple[Store, bytes, Results]:
    """Return the store of a finished run, the bytes of its results.json, and the results.

    Raises:
        UsageError: there is no finished run at `uri`.
        StageError: results.json is of another version, or damaged.
    """
    store = open_store(uri)
    content = store.read(RESULTS)
    if content is None:
        raise UsageError(
            f"{uri} has no results.json: it is not a run, or not finished; "
            "a run is <output>/<run-id>"
        )
    try:
        return store, content, Results.model_validate_json(content)
    except ValidationError as error:
        raise StageError(
            f"{uri}/results.json cannot be read by this version: {error.error_count()} problems"
        ) from error


def read_artifact(store: Store, results: Results, key: str) -> bytes | None:
    """Return the content of a file listed in the results; None if it is not listed.

    Raises:
        StageError: the file is missing, or its checksum is wrong.
    """
    item = next((item for item in results.artifacts if item.path == key), None)
    if item is None:
        return None
    content = store.read(key)
    if content is None:
        raise StageError(f"{store.uri}: the file {key} is missing")
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise StageError(f"{store.uri}: the file {key} does not have the checksum in results.json")
    return content
