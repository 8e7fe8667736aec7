"""`job fetch`: a finished run brought to this machine, every checksum checked."""

from pathlib import Path

from job import logs
from job.errors import StageError
from job.finished import read_results
from job.partial import PARTIAL
from job.results import Artifact
from job.storage import LocalStore, Store, check_key, file_sha256
from job.threads import Threads

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
