"""A staged dataset on disk: shards of checked examples, their records, and a manifest.

A shard is complete once its record exists, the dataset once its manifest exists. A dataset is
named by a key of everything it depends on, so that jobs share it, and one may finish what another
started.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from job.data.columnar import COLUMNS
from job.errors import StageError
from job.runtime.threads import Threads, prefetch_map
from job.storage.base import Store, file_sha256
from job.storage.local import LocalStore

_SAMPLE_CHARACTERS = 300
_PERCENTILES = (50, 90, 99)


class Lengths(BaseModel):
    """The number of texts of each length in characters."""

    counts: dict[int, int] = {}

    def add(self, lengths: np.ndarray) -> None:
        """Count lengths, int `[n]`."""
        values, times = np.unique(lengths, return_counts=True)
        self._add_counts(dict(zip(values.tolist(), times.tolist(), strict=True)))

    def merge(self, other: "Lengths") -> None:
        """Add the counts of other texts."""
        self._add_counts(other.counts)

    def _add_counts(self, counts: dict[int, int]) -> None:
        self.counts = dict(Counter(self.counts) + Counter(counts))

    def percentiles(self) -> dict[str, Any]:
        """Return the mean, p50, p90, p99 and the maximum."""
        lengths = np.repeat([*self.counts], [*self.counts.values()])
        if not len(lengths):
            return {}
        marks = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").tolist()
        return {
            "mean": round(float(lengths.mean()), 1),
            **{f"p{mark}": value for mark, value in zip(_PERCENTILES, marks, strict=True)},
            "max": int(lengths.max()),
        }


class RowTally(BaseModel):
    """Counts of kept, dropped and flagged rows."""

    raw: int = 0
    kept: int = 0
    dropped: dict[str, int] = {}
    """Dropped rows by reason."""
    found: dict[str, int] = {}
    """Kept examples by flag."""
    shown: dict[str, str] = {}
    """A sample of each reason and flag: the beginning of a row, or the text around a match."""
    text_bytes: int = 0
    with_messages: int = 0
    """Kept examples in the column `messages`."""
    prompt: Lengths = Lengths()
    response: Lengths = Lengths()

    def drop(self, reason: str, times: int, sample: Callable[[], object]) -> None:
        """Count dropped rows."""
        self.dropped[reason] = self.dropped.get(reason, 0) + times
        self._add_sample(reason, sample)

    def flag(self, name: str, times: int, sample: Callable[[], object]) -> None:
        """Count flagged examples."""
        self.found[name] = self.found.get(name, 0) + times
        self._add_sample(name, sample)

    def _add_sample(self, name: str, sample: Callable[[], object]) -> None:
        if name not in self.shown:
            value = sample()
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            self.shown[name] = (
                text[:_SAMPLE_CHARACTERS].encode("utf-8", "backslashreplace").decode()
            )

    def merge(self, other: "RowTally") -> None:
        """Add the counts of later rows."""
        self.raw += other.raw
        self.kept += other.kept
        self.text_bytes += other.text_bytes
        self.with_messages += other.with_messages
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.found = dict(Counter(self.found) + Counter(other.found))
        self.shown = other.shown | self.shown
        self.prompt.merge(other.prompt)
        self.response.merge(other.response)


MANIFEST = "manifest.json"

HASHES = ("hash", "normal_hash", "prompt_hash", "group_hash")
SCHEMA = pa.schema([*((name, pa.uint64()) for name in HASHES), *COLUMNS])
"""Columns of a shard: the hashes of `filters.content_hashes`, and the texts."""

READERS = 2
"""Threads that read shards, and shards in memory at a time."""


class Shard(BaseModel):
    """The record of a shard: `shard-00000.json` next to `shard-00000.parquet`."""

    path: str
    bytes: int
    sha256: str
    rows: int
    tally: RowTally
    """The outcome of the rows that were read for it."""
    file: int
    """Index of the source's file in which the next shard begins."""
    row: int
    """The number of rows of that file before it."""


class FileInfo(BaseModel):
    """A file of the source."""

    name: str
    bytes: int
    identity: str


class Manifest(BaseModel):
    """The record of a staged dataset, with the outcome of every row."""

    dataset: str
    revision: str | None
    key: str
    files: list[FileInfo]
    columns: list[str]
    tally: RowTally
    shards: list[Shard]

    @property
    def rows(self) -> int:
        """The number of examples in all shards."""
        return sum(shard.rows for shard in self.shards)


def shard_key(number: int, kind: str) -> str:
    """Return the key of a shard, `parquet`, or of its record, `json`."""
    return f"shard-{number:05d}.{kind}"


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest if it is valid and all of its shards exist."""
    content = store.read(MANIFEST)
    if content is None:
        return None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError:
        return None
    return manifest if all(_is_stored(shard, store) for shard in manifest.shards) else None


def _is_stored(shard: Shard, store: Store) -> bool:
    stat = store.stat(shard.path)
    return stat is not None and stat.bytes == shard.bytes


def complete_shards(store: Store) -> list[Shard]:
    """Return the leading shards that are complete."""
    shards: list[Shard] = []
    while content := store.read(shard_key(len(shards), "json")):
        try:
            shard = Shard.model_validate_json(content)
        except ValidationError:
            break
        if not _is_stored(shard, store):
            break
        shards.append(shard)
    return shards


class ShardFiles:
    """The shards of a dataset as local files, their checksums verified."""

    def __init__(self, store: Store, work: Path) -> None:
        """Open the shards in the dataset's `store`; downloads go into the scratch folder `work`."""
        self.store = store
        self._work = work
        self._hashes: dict[tuple[int, int, int, int], str] = {}

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file, which is not read again while it stays unchanged."""
        status = path.stat()
        file = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
        if file not in self._hashes:
            self._hashes[file] = file_sha256(path)
        return self._hashes[file]

    @contextlib.contextmanager
    def open(self, shard: Shard) -> Iterator[Path]:
        """Give a local file with the content of a shard, for the time of the block.

        Raises:
            StageError: it is missing or damaged; its record is deleted, so that it is
                staged again next time.
        """
        if isinstance(self.store, LocalStore):
            path = self.store.root / shard.path
            exists = path.is_file()
        else:
            path = self._work / shard.path
            exists = self.store.download(shard.path, path)
        if not exists or self.sha256(path) != shard.sha256:
            self.store.delete(MANIFEST)
            self.store.delete(f"{shard.path.removesuffix('.parquet')}.json")
            raise StageError(
                f"{self.store.uri}/{shard.path} is missing or damaged; run the same command "
                "again to stage it again"
            )
        yield path
        if path.is_relative_to(self._work):
            path.unlink()

    def read_hashes(self, shards: list[Shard]) -> Iterator[np.ndarray]:
        """Yield the hashes of each shard: uint64 `[4, rows]`."""

        def read(shard: Shard) -> np.ndarray:
            with self.open(shard) as path:
                table = pq.read_table(path, columns=[*HASHES], use_threads=False)
            return np.stack([column.to_numpy() for column in table.columns])

        with Threads(READERS) as pool:
            yield from prefetch_map(read, shards, pool, READERS)
