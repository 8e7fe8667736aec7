"""Split files: the training or held-out examples of a staged dataset, as Parquet, in their order.

A pass over the shards distributes the examples to pieces of the final order, each small enough to
be sorted in memory. The same examples give the same bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from job.chat.conversation import Conversation
from job.data.columnar import COLUMNS, example_from_columns, messages_from_json
from job.data.dataset import READERS, Shard, ShardFiles
from job.data.examples import Example
from job.data.staging import StagedDataset
from job.runtime.threads import Threads, prefetch_map

PIECE_ROWS = 16_384
"""Examples that are sorted at a time."""

_SCHEMA = pa.schema([("id", pa.string()), *COLUMNS])


def iter_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of a split file."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                yield example_from_columns(**row)


def renderable_rows(
    staged: StagedDataset,
    unrenderable: Callable[[Conversation], str | None],
    check_stop: Callable[[], None],
) -> tuple[np.ndarray, Counter[str]]:
    """Return which examples can be rendered, bool `[examples]`, and the reasons of the others."""
    renderable = np.ones(staged.manifest.rows, bool)
    reasons: Counter[str] = Counter()
    first = 0
    for shard in staged.manifest.shards:
        at, first = first, first + shard.rows
        if not shard.tally.with_messages:
            continue  # every template renders plain examples
        with staged.files.open(shard) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, columns=["messages"]):
                check_stop()
                for number, text in enumerate(batch["messages"].to_pylist(), at):
                    if text and (reason := unrenderable(messages_from_json(text))):
                        renderable[number] = False
                        reasons[reason] += 1
                at += batch.num_rows
    return renderable, reasons


def write_split_files(
    staged: StagedDataset, splits: Mapping[Path, np.ndarray], check_stop: Callable[[], None]
) -> None:
    """Write split files.

    Args:
        staged: the dataset.
        splits: for each file the indices of its examples, int64, in their order.
        check_stop: called for each shard; it may raise.
    """
    writers = [_SplitWriter(path, indices) for path, indices in splits.items()]
    parts = list(_parts(staged.manifest.shards, np.sort(np.concatenate(list(splits.values())))))

    def read(part: tuple[Shard, int, np.ndarray]) -> pa.Table:
        shard, first, indices = part
        return _read_rows(staged.files, shard, indices - first)

    with Threads(READERS) as pool:
        tables = prefetch_map(read, parts, pool, READERS)
        for (_, _, indices), table in zip(parts, tables, strict=True):
            check_stop()
            for writer in writers:
                writer.add(table, indices)
    for writer in writers:
        writer.write()


def _parts(shards: list[Shard], indices: np.ndarray) -> Iterator[tuple[Shard, int, np.ndarray]]:
    """Yield each shard with the index of its first example and those of `indices` in it."""
    first = 0
    for shard in shards:
        low, high = np.searchsorted(indices, [first, first + shard.rows])
        if high > low:
            yield shard, first, indices[low:high]
        first += shard.rows


def _read_rows(files: ShardFiles, shard: Shard, rows: np.ndarray) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    first = 0
    with files.open(shard) as path, pq.ParquetFile(path) as file:
        for batch in file.iter_batches(4096):
            low, high = np.searchsorted(rows, [first, first + batch.num_rows])
            if high > low:
                batches.append(batch.take(pa.array(rows[low:high] - first)))
            first += batch.num_rows
    table = pa.Table.from_batches(batches)
    raw = table["hash"].to_numpy().tobytes().hex()
    ids = [raw[at : at + 16] for at in range(0, len(raw), 16)]
    return pa.table([pa.array(ids), *(table[name] for name in _SCHEMA.names[1:])], schema=_SCHEMA)


class _SplitWriter:
    """A split file whose examples are collected in any order, and written in theirs."""

    def __init__(self, path: Path, indices: np.ndarray) -> None:
        self._path = path
        self._order = np.argsort(indices, kind="stable")
        self._indices = indices[self._order]
        count = -(-len(indices) // PIECE_ROWS)
        self._pieces = [_Piece(path.with_name(f"{path.name}.{n}")) for n in range(count)]

    def add(self, table: pa.Table, indices: np.ndarray) -> None:
        """Add those of the examples that belong to the split; `indices` are sorted."""
        low, high = np.searchsorted(self._indices, [indices[0], indices[-1] + 1])
        rows = np.searchsorted(indices, self._indices[low:high])
        positions = self._order[low:high]
        for number in np.unique(positions // PIECE_ROWS):
            mask = positions // PIECE_ROWS == number
            self._pieces[number].add(table.take(pa.array(rows[mask])), positions[mask])

    def write(self) -> None:
        """Write the file."""
        with pq.ParquetWriter(self._path, _SCHEMA, compression="zstd") as writer:
            for piece in self._pieces:
                writer.write_table(piece.sorted())


class _Piece:
    """Examples of a range of positions, collected in a temporary file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def add(self, table: pa.Table, positions: np.ndarray) -> None:
        """Add examples with their positions in the split file, int64 `[examples]`."""
        table = table.append_column("position", pa.array(positions))
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(str(self._path), table.schema)
        self._writer.write_table(table)

    def sorted(self) -> pa.Table:
        """Return the examples in order, and delete the temporary file."""
        self._writer.close()
        with pyarrow.ipc.open_file(str(self._path)) as reader:
            table = reader.read_all()
        self._path.unlink()
        return table.sort_by("position").drop_columns(["position"]).combine_chunks()
