"""A staged dataset: shards of checked examples, each with a record, and a manifest last.

A shard is whole once its record is there, the dataset once its manifest is. What is staged is
named by a key of everything it depends on, so runs share it, and any of them may finish what
another began.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from job.data.blocks import Place
from job.data.columnar import HISTORY, ExampleColumns
from job.errors import StageError
from job.runtime.threads import Threads, prefetch_map
from job.storage.base import Store, file_sha256
from job.storage.local import LocalStore

_EXACT_BITS = 9


_SHOWN = 300


_MARKS = (50, 90, 99)


class Lengths(BaseModel):
    """A histogram of lengths in characters: exact up to 511, then in steps below 0.4 %."""

    counts: dict[int, int] = {}
    largest: int = 0
    total: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count these lengths, int `[n]`."""
        if not len(lengths):
            return
        values = lengths.astype(np.int64)
        bits = np.frexp(values.astype(float))[1]
        shift = np.maximum(bits - _EXACT_BITS, 0)
        steps, times = np.unique((values >> shift) << shift, return_counts=True)
        self._merge(dict(zip(steps.tolist(), times.tolist(), strict=True)))
        self.largest = max(self.largest, int(values.max()))
        self.total += int(values.sum())

    def join(self, other: "Lengths") -> None:
        """Add what the other has counted."""
        self._merge(other.counts)
        self.largest = max(self.largest, other.largest)
        self.total += other.total

    def _merge(self, counts: dict[int, int]) -> None:
        for step, times in counts.items():
            self.counts[step] = self.counts.get(step, 0) + times

    def percentiles(self) -> dict[str, Any]:
        """Mean, p50, p90, p99 and the largest."""
        steps = sorted(self.counts)
        running = np.cumsum([self.counts[step] for step in steps])
        if not steps:
            return {}
        made: dict[str, Any] = {"mean": round(self.total / int(running[-1]), 1)}
        for mark in _MARKS:
            place = np.searchsorted(running, running[-1] * mark / 100)
            made[f"p{mark}"] = steps[min(int(place), len(steps) - 1)]
        return made | {"max": self.largest}


class RowStats(BaseModel):
    """What became of rows."""

    raw: int = 0
    kept: int = 0
    dropped: dict[str, int] = {}
    """Rows by the reason they were dropped for."""
    found: dict[str, int] = {}
    """Kept examples by the fault they have."""
    shown: dict[str, str] = {}
    """One example of each reason and fault: the beginning of the row or the text."""
    text_bytes: int = 0
    prompt: Lengths = Lengths()
    response: Lengths = Lengths()

    def drop(self, reason: str, times: int, shown: object) -> None:
        """Count rows that are not kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + times
        self._show(reason, shown)

    def find(self, fault: str, times: int, shown: object) -> None:
        """Count examples that are kept in spite of a fault."""
        self.found[fault] = self.found.get(fault, 0) + times
        self._show(fault, shown)

    def knows(self, name: str) -> bool:
        """Whether there is an example of it."""
        return name in self.shown

    def _show(self, name: str, shown: object) -> None:
        if name not in self.shown:
            text = shown if isinstance(shown, str) else json.dumps(shown, default=str)
            self.shown[name] = text[:_SHOWN].encode("utf-8", "backslashreplace").decode()

    def join(self, other: "RowStats") -> None:
        """Add what the other has counted; examples that are here already stay."""
        self.raw += other.raw
        self.kept += other.kept
        self.text_bytes += other.text_bytes
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.found = dict(Counter(self.found) + Counter(other.found))
        self.shown = other.shown | self.shown
        self.prompt.join(other.prompt)
        self.response.join(other.response)


MANIFEST = "manifest.json"


SCHEMA = pa.schema(
    [
        ("hash", pa.uint64()),
        ("group", pa.uint64()),
        ("system", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("history", HISTORY),
    ]
)
"""Columns of a shard: hashes of the text and of its letters and digits, and the texts."""


READERS = 2
"""Threads that read shards, and shards that are held at once."""


_GROUP_BYTES = 8 * 1024 * 1024


class Shard(BaseModel):
    """The record of a shard: `shard-00000.json` beside `shard-00000.parquet`."""

    path: str
    bytes: int
    sha256: str
    rows: int
    tally: RowStats
    """What became of the rows that were read for it."""
    file: int
    """Number of the file of the source in which reading goes on."""
    offset: int
    line: int
    """Where in that file reading goes on."""

    @property
    def place(self) -> Place:
        """Where in its file the next shard begins."""
        return Place(self.offset, self.line)


class FileInfo(BaseModel):
    """A file of the source."""

    name: str
    bytes: int
    identity: str


class Manifest(BaseModel):
    """What was staged, and what became of every row."""

    dataset: str
    revision: str | None
    key: str
    files: list[FileInfo]
    columns: list[str]
    tally: RowStats
    shards: list[Shard]

    @property
    def rows(self) -> int:
        """Examples in all shards."""
        return sum(shard.rows for shard in self.shards)


def shard_key(number: int, kind: str) -> str:
    """The key of a shard, `parquet`, or of its record, `json`."""
    return f"shard-{number:05d}.{kind}"


def read_manifest(store: Store) -> Manifest | None:
    """The manifest, if there is one that can be read and all of its shards are there."""
    content = store.read(MANIFEST)
    if content is None:
        return None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError:
        return None
    if all(store.size(shard.path) == shard.bytes for shard in manifest.shards):
        return manifest
    return None


def whole_shards(store: Store) -> list[Shard]:
    """The shards from the first on that are whole."""
    found: list[Shard] = []
    while content := store.read(shard_key(len(found), "json")):
        try:
            shard = Shard.model_validate_json(content)
        except ValidationError:
            break
        if store.size(shard.path) != shard.bytes:
            break
        found.append(shard)
    return found


_HASHED: dict[tuple[int, int, int, int], str] = {}


def shard_sha256(path: Path) -> str:
    """The SHA-256 of a shard, which is not read again while the file stays as it is."""
    status = path.stat()
    file = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    if file not in _HASHED:
        _HASHED[file] = file_sha256(path)
    return _HASHED[file]


def open_shard(store: Store, shard: Shard, work: Path) -> Path:
    """A local file with the content of a shard, its checksum checked; see `close_shard`.

    Raises:
        StageError: it is missing or damaged; its record is removed, so that the next run makes
            it again.
    """
    path = work / shard.path
    if isinstance(store, LocalStore):
        path = store.root / shard.path
        there = path.is_file()
    else:
        there = store.download(shard.path, path)
    if not there or shard_sha256(path) != shard.sha256:
        store.delete(MANIFEST)
        store.delete(f"{shard.path.removesuffix('.parquet')}.json")
        raise StageError(
            f"{store.uri}/{shard.path} is not as it was written; it has been given up, and is "
            "made again when the same command is run again"
        )
    return path


def close_shard(path: Path, work: Path) -> None:
    """Remove the local copy, if it was one."""
    if path.is_relative_to(work):
        path.unlink()


def read_hashes(store: Store, shards: list[Shard], work: Path) -> Iterator[np.ndarray]:
    """For each shard its hashes and groups: uint64 `[2, rows]`."""

    def read(shard: Shard) -> np.ndarray:
        path = open_shard(store, shard, work)
        table = pq.read_table(path, columns=["hash", "group"], use_threads=False)
        close_shard(path, work)
        return np.stack([table["hash"].to_numpy(), table["group"].to_numpy()])

    with Threads(READERS) as pool:
        yield from prefetch_map(read, shards, pool, READERS)


class ShardWriter:
    """Writes the examples of one shard to a local file, a few megabytes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._writer = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            compression_level=1,
            use_dictionary=["system"],
            write_statistics=False,
        )
        self._waiting: list[pa.RecordBatch] = []
        self._held = 0

    def write(self, mapped: ExampleColumns, hashes: np.ndarray, groups: np.ndarray) -> None:
        """Add examples."""
        batch = pa.record_batch(
            [
                pa.array(hashes),
                pa.array(groups),
                mapped.system,
                mapped.prompt,
                mapped.response,
                mapped.history,
            ],
            schema=SCHEMA,
        )
        self.rows += batch.num_rows
        self._waiting.append(batch)
        self._held += batch.nbytes
        if self._held >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
        self._waiting, self._held = [], 0

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()
