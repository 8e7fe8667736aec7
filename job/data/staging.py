"""Staging: stream rows from their source through checks into shards, in constant memory.

Hashing holds Python's lock; reading, pattern matching, compression and uploads release it and run
in threads meanwhile. An interrupted staging resumes after the last complete shard. Where shards
end depends only on the rows, so the result is the same.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job.data.columnar import to_columns
from job.data.dataset import (
    GROUP_ROWS,
    MANIFEST,
    SCHEMA,
    Manifest,
    RowTally,
    Shard,
    StagedDataset,
    read_manifest,
)
from job.data.examples import ExampleMapper
from job.data.filters import (
    CheckedExamples,
    FilterResult,
    RowFilter,
    check_examples,
    excerpt,
)
from job.data.readers import read_blocks
from job.data.row_blocks import Block
from job.data.sources import RowSource
from job.errors import UsageError
from job.runtime import logs
from job.runtime.threads import Threads, prefetch, prefetch_map
from job.runtime.watchdog import WATCHDOG, Advance, progress
from job.spec.load import digest
from job.spec.schema import Data
from job.storage.base import Store, file_sha256
from job.storage.lease import Lease, LeaseHeldError

STAGING_VERSION = 6
"""Part of every key; increment it when the same rows are staged differently."""

SHARD_ROWS = 16_384
SHARD_BYTES = 64 * 1024 * 1024
_MAX_UNUSABLE_ROWS = 1000
"""Leading unusable rows after which the templates are assumed to be wrong."""

_LEASE_POLL_SECONDS = 2.0
_CHECKERS = 2
"""Threads that check blocks."""

_CHECKED_AHEAD = 3
"""Blocks that are checked before they are needed."""

CheckStop = Callable[[], None]


def staging_key(data: Data, rows: RowSource) -> str:
    """Return a digest of everything the staged rows depend on."""
    mapping = data.model_dump(
        mode="json",
        include={"dataset", "config", "split", "prompt", "response", "system", "messages", "group"}
        | {"drop_duplicates", "checks"},
    )
    files = [[Path(file.name).name, file.identity] for file in rows.files]
    limits = [SHARD_ROWS, SHARD_BYTES]
    return digest([STAGING_VERSION, limits, mapping, rows.revision, files])[:24]


def stage_rows(
    data: Data, rows: RowSource, store: Store, work: Path, check_stop: CheckStop
) -> StagedDataset:
    """Stage a source, unless that is already done.

    Args:
        data: the section of the spec.
        rows: the source.
        store: the folder of this dataset (see `staging_key`).
        work: a scratch folder.
        check_stop: called regularly; it may raise.

    Raises:
        UsageError: no row can be used.
        JobError: the source or the store fails.
    """
    manifest = read_manifest(store)
    if manifest and manifest.complete:
        logs.get().info(
            "dataset already staged", dataset=data.dataset, rows=manifest.rows, staged=store.uri
        )
        return StagedDataset(manifest, store, work)
    with _dataset_lease(store, check_stop) as lease:
        manifest = read_manifest(store) or Manifest(dataset=data.dataset, revision=rows.revision)
        staged = StagedDataset(manifest, store, work)
        if not manifest.complete:
            clock = time.monotonic()
            read = _Stager(data, rows, staged, check_stop, lease).run()
            seconds = time.monotonic() - clock
            logs.get().info(
                "dataset staged",
                rows=read,
                shards=len(manifest.shards),
                rows_per_second=round(read / max(seconds, 1e-9)),
                staged=store.uri,
            )
    return staged


@contextlib.contextmanager
def _dataset_lease(store: Store, check_stop: CheckStop) -> Iterator[Lease]:
    """Hold the dataset's lease, after waiting while another process stages the dataset."""
    logged = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(Lease(store, "this dataset", lambda why: None))
                break
            except LeaseHeldError as held:
                if not logged:
                    logs.get().info(
                        "waiting while another run stages this dataset", reason=str(held)
                    )
                logged = True
            deadline = time.monotonic() + _LEASE_POLL_SECONDS
            while time.monotonic() < deadline:
                check_stop()
                WATCHDOG.beat()
                time.sleep(0.1)
        yield lease


@dataclass
class _OpenShard:
    """The shard that is being filled; `file` and `row` are those of `Shard`."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    tally: RowTally = field(default_factory=RowTally)
    file: int = 0
    row: int = 0

    @property
    def is_full(self) -> bool:
        return self.tally.raw >= SHARD_ROWS or self.tally.text_bytes >= SHARD_BYTES


@dataclass
class _Stager:
    """One pass over the source."""

    data: Data
    rows: RowSource
    staged: StagedDataset
    check_stop: CheckStop
    lease: Lease
    columns: list[str] = field(default_factory=list)
    """Those of the first row, for messages."""
    storing: Future[None] | None = None
    """The last shard, written in the background."""

    def __post_init__(self) -> None:
        self.manifest = self.staged.manifest
        self.mapper = ExampleMapper(self.data)
        self.filter = RowFilter(self.data.checks, drop_duplicates=self.data.drop_duplicates)

    def run(self) -> int:
        """Stage the remaining rows and complete the manifest; return the number of rows read."""
        shards = self.manifest.shards
        if shards:
            logs.get().info("resumed staging", shards=len(shards))
            self.filter.remember(*self.staged.hashes()[:2])
        before = self.manifest.tally.raw
        with Threads(1) as read, Threads(_CHECKERS) as check, Threads(1) as store:
            with progress("rows", None, before) as advance:
                self._stage(prefetch(self._blocks(), read), check, store, advance)
            if self.storing:
                self.storing.result()
        tally = self.manifest.tally
        if not tally.kept:
            raise UsageError(self._no_example_message(tally))
        self.manifest.complete = True
        self._write_manifest()
        return tally.raw - before

    def _stage(
        self,
        blocks: Iterator[tuple[int, Block | None]],
        check: Threads,
        store: Threads,
        advance: Advance,
    ) -> None:
        shard = _OpenShard()
        row = self.manifest.shards[-1].row if self.manifest.shards else 0
        for file, block, checked in prefetch_map(self._checked, blocks, check, _CHECKED_AHEAD):
            self.check_stop()
            if block is None or checked is None:  # the end of a file
                row = 0
                shard.file, shard.row = file + 1, row
                continue
            if shard.is_full:
                self._store(shard, store)
                shard = _OpenShard()
            result = self.filter.apply(checked)
            self._count(shard.tally, block, checked, result)
            kept = checked.columns.take(result.keep).batch.columns
            hashes = checked.hashes[:, result.keep]
            shard.batches.append(pa.record_batch([*map(pa.array, hashes), *kept], schema=SCHEMA))
            row += len(block)
            shard.file, shard.row = file, row
            advance(len(block))
            self._require_examples(shard, _MAX_UNUSABLE_ROWS)
        self._require_examples(shard, 0)
        if shard.tally.raw:
            self._store(shard, store)

    def _blocks(self) -> Iterator[tuple[int, Block | None]]:
        """Yield the blocks that are not staged yet, and None at the end of each file."""
        shards = self.manifest.shards
        first, skip = (shards[-1].file, shards[-1].row) if shards else (0, 0)
        for number in range(first, len(self.rows.files)):
            file = self.rows.files[number]
            for block in read_blocks(file.fetch(), file.name, skip, self.mapper.fields):
                yield number, block
            yield number, None
            skip = 0

    def _checked(
        self, numbered: tuple[int, Block | None]
    ) -> tuple[int, Block | None, CheckedExamples | None]:
        """Make and check the examples of a block."""
        file, block = numbered
        if block is None:
            return file, None, None
        return file, block, check_examples(to_columns(block, self.mapper), self.data.checks)

    def _count(
        self, tally: RowTally, block: Block, checked: CheckedExamples, result: FilterResult
    ) -> None:
        examples = checked.columns
        tally.raw += len(block)
        tally.kept += int(result.keep.sum())
        reasons: dict[str, list[int]] = defaultdict(list)
        for row, reason in examples.dropped:
            reasons[reason].append(row)
        for reason, mask in result.dropped.items():
            reasons[reason] += examples.rows[mask].tolist()
        for reason, numbers in reasons.items():
            tally.dropped[reason] += len(numbers)
            if reason not in tally.shown:
                tally.show(reason, json.dumps(block.rows()[min(numbers)], default=str))
        for flag, mask in result.flagged.items():
            if mask.any():
                tally.found[flag] += int(mask.sum())
                if flag not in tally.shown:
                    tally.show(flag, excerpt(checked, int(mask.argmax()), flag))
        tally.text_bytes += int(checked.text_bytes[result.keep].sum())
        messages = np.asarray(examples.batch["messages"].is_valid())
        tally.with_messages += int((messages & result.keep).sum())
        if not self.columns and (rows := block.rows()):
            self.columns = sorted(rows[0])

    def _require_examples(self, shard: _OpenShard, after: int) -> None:
        """Raise a UsageError if none of the first rows, at least `after`, gives an example."""
        is_first = not self.storing and not self.manifest.shards
        if is_first and not shard.tally.kept and shard.tally.raw >= after:
            raise UsageError(self._no_example_message(shard.tally))

    def _no_example_message(self, tally: RowTally) -> str:
        if not tally.raw:
            return f"data.dataset: {self.data.dataset} has no rows"
        reasons = ", ".join(f"{reason} ({n})" for reason, n in tally.dropped.most_common(3))
        change = "data.messages" if self.data.messages else "data.prompt and data.response"
        return (
            f"data: none of the first {tally.raw} rows of {self.data.dataset} can be used: "
            f"{reasons}; the columns are {', '.join(self.columns)}; change {change}"
        )

    def _store(self, shard: _OpenShard, thread: Threads) -> None:
        """Write a shard and its record in the background, after the one before."""
        if self.storing:
            self.storing.result()
        self.storing = thread.submit(self._store_now, shard)

    def _store_now(self, shard: _OpenShard) -> None:
        path = self.staged.work / f"shard-{len(self.manifest.shards):05d}.parquet"
        pq.write_table(
            pa.Table.from_batches(shard.batches),
            path,
            row_group_size=GROUP_ROWS,
            compression="zstd",
            compression_level=1,
            use_dictionary=["system"],
            write_statistics=False,
        )
        record = Shard(
            path=path.name,
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            tally=shard.tally,
            file=shard.file,
            row=shard.row,
        )
        self.staged.store.upload(path, record.path)
        path.unlink()
        first = self.manifest.shards[-1].file if self.manifest.shards else 0
        self.manifest.shards.append(record)
        self._write_manifest()
        for file in self.rows.files[first : record.file]:
            if file.cached:
                file.cached.unlink(missing_ok=True)
        logs.get().info("shard staged", shard=record.path, rows=record.rows, bytes=record.bytes)

    def _write_manifest(self) -> None:
        self.lease.check()
        self.staged.store.write(MANIFEST, self.manifest.model_dump_json(indent=1).encode())
