"""`job fetch`: a finished run brought to this machine, every checksum checked."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from job.errors import StageError, UsageError
from job.results import Artifact, Results
from job.runtime import logs
from job.runtime.threads import Threads
from job.storage.base import PARTIAL, Store, check_key, file_sha256
from job.storage.local import LocalStore
from job.storage.locations import open_store

_AT_ONCE = 4


def _fetch_one(source: Store, target: LocalStore, item: Artifact) -> bool:
    """Bring one file, unless it is there already; whether it was.

    What a download that was cut off has got stays beside it, and the next goes on there.
    """
    path = target.root / item.path
    if not path.resolve().is_relative_to(target.root.resolve()):
        raise StageError(f"{path} leads out of {target.root} by a link; remove it")
    if path.is_file() and path.stat().st_size == item.bytes and file_sha256(path) == item.sha256:
        return True
    arriving = path.with_name(f"{PARTIAL}{path.name}")
    if not source.download(item.path, arriving):
        raise StageError(f"{source.uri}: the file {item.path} is missing")
    if arriving.stat().st_size != item.bytes or file_sha256(arriving) != item.sha256:
        arriving.unlink()
        raise StageError(
            f"{source.uri}: the file {item.path} does not have the checksum in results.json"
        )
    try:
        arriving.replace(path)
    except OSError as error:
        raise StageError(f"cannot write {path}: {error.strerror}") from error
    return False


def fetch_run(uri: str, folder: str) -> None:
    """Copy a run into `folder`; files that are there already and right are kept.

    `results.json` is written last, so its presence means that everything arrived.

    Raises:
        UsageError: there is no finished run at `uri`.
        StageError: a file is missing, or does not have its checksum.
    """
    logs.configure(logs.RunLog())
    source, content, results = read_results(uri)
    target = LocalStore(Path(folder))
    if target.read("results.json") != content:
        target.delete("results.json")
    checked = {check_key(item.path): item for item in results.artifacts}
    with Threads(_AT_ONCE) as pool:
        jobs = [pool.submit(_fetch_one, source, target, item) for item in checked.values()]
        try:
            kept = sum(job.result() for job in jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for key in source.list():
        if key not in checked and key.startswith(("logs/", "stages/")):
            extra = source.read(check_key(key))
            if extra is not None:
                target.write(key, extra)
    target.write("results.json", content)
    logs.get().info(
        "fetched; every checksum is right", files=len(checked), kept=kept, folder=target.uri
    )


def read_results(uri: str) -> tuple[Store, bytes, Results]:
    """The store of a run, its results.json, and what that says.

    Raises:
        UsageError: there is no finished run.
        StageError: its results are of another version, or damaged.
    """
    store = open_store(uri)
    content = store.read("results.json")
    if content is None:
        raise UsageError(
            f"{uri} has no results.json: it is not a run, or not finished; "
            "a run is <output>/<run-id>"
        )
    try:
        return store, content, Results.model_validate_json(content)
    except ValidationError as error:
        raise StageError(
            f"{uri}/results.json is not one this version reads: {error.error_count()} problems"
        ) from error


def read_artifact(store: Store, results: Results, key: str) -> bytes | None:
    """The content of a file that the results list; None where they do not.

    Raises:
        StageError: it is missing, or does not have its checksum.
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
