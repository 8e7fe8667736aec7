"""Writing one shard of a staged dataset, in a background thread."""

from collections import deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job.data.columnar import ExampleColumns
from job.data.dataset import SCHEMA, RowTally, Shard, ShardFiles, shard_key
from job.runtime.threads import Threads

_GROUP_BYTES = 8 * 1024 * 1024
"""Bytes of a row group, about."""

_PENDING_WRITES = 6
"""Blocks that may wait to be written, because a row group is compressed in one piece."""


class OpenShard:
    """The shard that is being written."""

    def __init__(self, work: Path, number: int, thread: Threads) -> None:
        self.number = number
        self.path = work / shard_key(number, "parquet")
        self.tally = RowTally()
        self.file = 0
        self.row = 0
        self.lengths: list[np.ndarray] = []
        """Characters of the prompts and responses, int `[2, examples]` each."""
        self._thread = thread
        self._writer: _ParquetFile | None = None
        self._pending: deque[Future[None]] = deque()

    def write(self, examples: ExampleColumns, hashes: np.ndarray) -> None:
        """Add examples with their hashes, uint64 `[4, examples]`, in the background."""
        if self._writer is None:
            self._writer = _ParquetFile(self.path)
        self.tally.with_messages += len(examples) - examples.batch["messages"].null_count
        while len(self._pending) >= _PENDING_WRITES:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._writer.write, examples, hashes))

    def close(self, files: ShardFiles) -> Future[Shard]:
        """Finish the file in the background; the result is its record."""
        return self._thread.submit(self._finish, files)

    def _finish(self, files: ShardFiles) -> Shard:
        for write in self._pending:
            write.result()
        if self._writer:
            self._writer.close()
        if self.lengths:
            prompts, responses = np.concatenate(self.lengths, axis=1)
            self.tally.prompt.add(prompts)
            self.tally.response.add(responses)
        return Shard(
            path=shard_key(self.number, "parquet"),
            bytes=self.path.stat().st_size,
            sha256=files.sha256(self.path),
            rows=self.tally.kept,
            tally=self.tally,
            file=self.file,
            row=self.row,
        )


class _ParquetFile:
    """Writes the examples of one shard to a local file, a few megabytes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            compression_level=1,
            use_dictionary=["system"],
            write_statistics=False,
        )
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0

    def write(self, examples: ExampleColumns, hashes: np.ndarray) -> None:
        """Add examples with their hashes, uint64 `[4, examples]`."""
        columns = [*map(pa.array, hashes), *examples.batch.columns]
        batch = pa.record_batch(columns, schema=SCHEMA)
        self._pending.append(batch)
        self._pending_bytes += batch.nbytes
        if self._pending_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending).combine_chunks())
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()
