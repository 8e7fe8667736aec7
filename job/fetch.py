"""`job fetch`: a finished run brought to this machine, every checksum checked."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from job import logs
from job.errors import StageError, UsageError
from job.results import Results
from job.storage import LocalStore, check_key, open_store


def fetch_run(uri: str, folder: str) -> None:
    """Copy a run into `folder`; files that are there already and right are kept.

    `results.json` is written last, so its presence means that everything arrived.

    Raises:
        UsageError: there is no finished run at `uri`.
        StageError: a file is missing, or does not have its checksum.
    """
    logs.configure(logs.RunLog())
    source, target = open_store(uri), LocalStore(Path(folder))
    content = source.read("results.json")
    if content is None:
        raise UsageError(
            f"{uri} has no results.json: it is not a run, or not finished; "
            "a run is <output>/<run-id>"
        )
    try:
        results = Results.model_validate_json(content)
    except ValidationError as error:
        raise StageError(
            f"{uri}/results.json is not one this version reads: {error.error_count()} problems"
        ) from error
    if target.read("results.json") != content:
        target.delete("results.json")
    kept = 0
    checked = {check_key(item.path): item for item in results.artifacts}
    for key, item in checked.items():
        present = target.read(key)
        if present is not None and hashlib.sha256(present).hexdigest() == item.sha256:
            kept += 1
            continue
        found = source.read(key)
        if found is None:
            raise StageError(f"{uri}: the file {key} is missing")
        if len(found) != item.bytes or hashlib.sha256(found).hexdigest() != item.sha256:
            raise StageError(f"{uri}: the file {key} does not have the checksum in results.json")
        target.write(key, found)
    for key in source.list():
        if key not in checked and key.startswith(("logs/", "stages/")):
            extra = source.read(check_key(key))
            if extra is not None:
                target.write(key, extra)
    target.write("results.json", content)
    logs.get().info(
        "fetched; every checksum is right", files=len(checked), kept=kept, folder=target.uri
    )
