"""A finished run at a URI: its results, and files of it that are what the results say."""

import hashlib

from pydantic import ValidationError

from job.errors import StageError, UsageError
from job.results import Results
from job.storage import Store, open_store


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
