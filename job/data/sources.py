"""Rows from where they are: a dataset of the Hub (streamed), a local file, or the samples.

Every source gives plain dictionaries, one a row, and says which revision they are of. What
the rows mean is the business of `examples` and of the evaluations.
"""

import csv
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from job.errors import UsageError
from job.hub import hub_errors
from job.revisions import NONE, Revisions, resolve_commit, source_key
from job.spec import Source
from job.spec_types import SAMPLES

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows to be read once, and the commit they are of (None for local files)."""

    revision: str | None
    iterate: Callable[[], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.iterate()


def open_rows(
    source: Source, samples: Literal["dialogues", "questions"], revisions: Revisions = NONE
) -> Rows:
    """The rows of a source, of the commit in `revisions` if it has one.

    Raises:
        UsageError: there is no such file or dataset, or it is not what its name says.
        EnvironmentProblem: the Hub asks for credentials that are not there.
        StageError: the Hub cannot be reached.
    """
    if source.dataset == SAMPLES:
        path = Path(str(resources.files("job") / "samples" / f"{samples}.jsonl"))
        return Rows(None, lambda: _json_lines(path))
    if source.dataset.startswith("hf://"):
        return _hub_rows(source, revisions)
    path = Path(source.dataset)
    readers = {
        ".json": _json_array,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{source.dataset}: cannot tell the format; name it {', '.join(sorted(readers))}"
        )
    return Rows(None, lambda: reader(path))


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object with named fields, not {value!r:.60}")
    return value


def _json_array(path: Path) -> Iterator[Row]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: not valid JSON: {error}; for a row a line name it .jsonl"
        ) from None
    if not isinstance(document, list):
        raise UsageError(f"{path}: must hold one array of rows; for a row a line name it .jsonl")
    for number, value in enumerate(document):
        yield _as_row(value, f"{path}: row {number}")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _as_row(json.loads(line), f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 text: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not valid JSON: {error}") from None


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row:
                    raise UsageError(
                        f"{path}:{reader.line_num}: more fields than the header names; "
                        "quote fields that hold commas"
                    )
                yield dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not a readable CSV file: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable Parquet file: {error}") from None


def _hub_rows(source: Source, revisions: Revisions) -> Rows:
    import datasets

    repository = source.dataset.removeprefix("hf://")
    commit = revisions.get(source_key(source) or "") or resolve_commit(
        "dataset", repository, source.revision
    )

    def iterate() -> Iterator[Row]:
        with hub_errors("dataset", repository, source.revision):
            stream = datasets.load_dataset(
                repository,
                source.config,
                split=source.split,
                revision=commit,
                data_files=source.data_files,
                streaming=True,
            )
            try:
                for row in stream:
                    yield dict(row)
            finally:
                # A Parquet stream still alive when the interpreter exits can abort it.
                del stream
                gc.collect()

    return Rows(commit, iterate)
