"""A staged dataset on disk: shards of checked examples, and a manifest of those that are complete.

A shard is complete once the manifest lists it. A dataset is named by a key of everything it
depends on, so that jobs share it, and one may finish what another started.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from job.data.columnar import COLUMNS
from job.errors import StageError
from job.storage.base import Store, file_sha256
from job.storage.local import LocalStore

MANIFEST = "manifest.json"

HASHES = ("hash", "normal_hash", "prompt_hash", "group_hash")
SCHEMA = pa.schema([*((name, pa.uint64()) for name in HASHES), *COLUMNS])
"""Columns of a shard: the hashes of `filters.content_hashes`, and the texts."""

GROUP_ROWS = 4096
"""Examples of a row group."""

_SAMPLE_CHARACTERS = 300


class RowTally(BaseModel):
    """Counts of kept, dropped and flagged rows."""

    raw: int = 0
    kept: int = 0
    dropped: Counter[str] = Counter()
    """Dropped rows by reason."""
    found: Counter[str] = Counter()
    """Kept examples by flag."""
    shown: dict[str, str] = {}
    """A sample of each reason and flag: the beginning of a row, or the text around a match."""
    text_bytes: int = 0
    with_messages: int = 0
    """Kept examples in the column `messages`."""

    def show(self, name: str, text: str) -> None:
        """Add the sample of a reason or flag."""
        self.shown[name] = text[:_SAMPLE_CHARACTERS].encode("utf-8", "backslashreplace").decode()

    def merge(self, other: "RowTally") -> None:
        """Add the counts of later rows."""
        self.raw += other.raw
        self.kept += other.kept
        self.text_bytes += other.text_bytes
        self.with_messages += other.with_messages
        self.dropped += other.dropped
        self.found += other.found
        self.shown = other.shown | self.shown


class Shard(BaseModel):
    """The record of a shard."""

    path: str
    bytes: int
    sha256: str
    tally: RowTally
    """The outcome of the rows that were read for it."""
    file: int
    """Index of the source's file in which the next shard begins."""
    row: int
    """The number of rows of that file before it."""

    @property
    def rows(self) -> int:
        """The number of its examples."""
        return self.tally.kept


class Manifest(BaseModel):
    """The record of a staged dataset, with the outcome of every row."""

    dataset: str
    revision: str | None
    shards: list[Shard] = []
    complete: bool = False

    @property
    def rows(self) -> int:
        """The number of examples in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tally(self) -> RowTally:
        """The counts of all shards."""
        total = RowTally()
        for shard in self.shards:
            total.merge(shard.tally)
        return total


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest with the leading shards that exist; None if there is no valid one."""
    try:
        manifest = Manifest.model_validate_json(store.read(MANIFEST) or b"")
    except ValidationError:
        return None

    def is_stored(shard: Shard) -> bool:
        stat = store.stat(shard.path)
        return stat is not None and stat.bytes == shard.bytes

    stored = list(itertools.takewhile(is_stored, manifest.shards))
    complete = manifest.complete and len(stored) == len(manifest.shards)
    return manifest.model_copy(update={"shards": stored, "complete": complete})


@dataclass(frozen=True)
class StagedDataset:
    """The shards of a dataset, whose checksums are verified whenever they are read."""

    manifest: Manifest
    store: Store
    work: Path
    """A scratch folder for downloads."""

    def batches(self, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield columns of the examples in batches, each with the index of its first example.

        Raises:
            StageError: a shard is missing or damaged; the manifest is deleted, so that the dataset
                is staged again next time.
        """
        first = 0
        for shard in self.manifest.shards:
            if isinstance(self.store, LocalStore):
                path = self.store.root / shard.path
                exists = path.is_file()
            else:
                path = self.work / shard.path
                exists = self.store.download(shard.path, path)
            if not exists or file_sha256(path) != shard.sha256:
                self.store.delete(MANIFEST)
                raise StageError(
                    f"{self.store.uri}/{shard.path} is missing or damaged; run the same command "
                    "again to stage it again"
                )
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1024, columns=columns):
                    yield first, batch
                    first += batch.num_rows
            if path.is_relative_to(self.work):
                path.unlink()

    def hashes(self) -> np.ndarray:
        """Return the hashes of all examples, uint64 `[4, examples]`; see `content_hashes`."""
        batches = [np.stack(batch.columns) for _, batch in self.batches([*HASHES])]
        return np.concatenate([np.zeros((len(HASHES), 0), np.uint64), *batches], axis=1)
