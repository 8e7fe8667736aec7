"""Staging: stream rows from their source through checks into shards, in constant memory.

Hashing holds Python's lock; reading, pattern matching, compression and uploads release it and run
in threads meanwhile. An interrupted staging resumes after the last complete shard. Where shards
end depends only on the rows, so the result is the same.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from job.data.columnar import ExampleColumns, to_columns
from job.data.dataset import (
    MANIFEST,
    FileInfo,
    Manifest,
    RowTally,
    Shard,
    ShardFiles,
    complete_shards,
    read_manifest,
)
from job.data.examples import ExampleMapper
from job.data.filters import (
    FilterResult,
    Flags,
    RowFilter,
    TextStats,
    content_hashes,
    excerpt,
    find_flags,
    text_stats,
)
from job.data.readers import read_blocks
from job.data.row_blocks import Block, FilePosition, Row
from job.data.shard_writer import OpenShard
from job.data.sources import RowSource
from job.errors import UsageError
from job.runtime import logs
from job.runtime.threads import Threads, delay, prefetch
from job.runtime.watchdog import WATCHDOG, Advance, progress
from job.spec.load import digest
from job.spec.schema import Data
from job.storage.base import Store
from job.storage.lease import Lease, LeaseHeldError, hold_lease

STAGING_VERSION = 5
"""Part of every key; increment it when the same rows are staged differently."""

SHARD_ROWS = 16_384
SHARD_BYTES = 64 * 1024 * 1024
_MAX_UNUSABLE_ROWS = 1000
"""Leading unusable rows after which the templates are assumed to be wrong."""

_LEASE_POLL_SECONDS = 2.0
_PENDING_CHECKS = 2
"""Blocks whose patterns may still be matched while the next are hashed."""

CheckStop = Callable[[], None]


def staging_key(data: Data, rows: RowSource) -> str:
    """Return a digest of everything the staged rows depend on."""
    mapping = data.model_dump(
        mode="json",
        include={"dataset", "config", "split", "prompt", "response", "system", "messages"}
        | {"drop_duplicates", "checks"},
    )
    files = [[Path(file.name).name, file.identity] for file in rows.files]
    limits = [SHARD_ROWS, SHARD_BYTES]
    return digest([STAGING_VERSION, limits, mapping, rows.revision, files])[:24]


@dataclass(frozen=True)
class StagedDataset:
    """A staged dataset."""

    manifest: Manifest
    files: ShardFiles
    hashes: np.ndarray
    """Hashes and groups of all examples, uint64 `[2, examples]`."""


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
    files = ShardFiles(store, work)
    if manifest := read_manifest(store):
        logs.get().info(
            "dataset already staged", dataset=data.dataset, rows=manifest.rows, staged=store.uri
        )
        return _load(manifest, files)
    with _dataset_lease(store, check_stop) as lease:
        if manifest := read_manifest(store):
            return _load(manifest, files)
        clock = time.monotonic()
        stager = _Stager(data, rows, files, work, check_stop, lease)
        manifest = stager.run()
        seconds = time.monotonic() - clock
    hashes, read = stager.hashes, stager.rows_read
    del stager  # its sets of hashes need as much memory as the hashes
    logs.get().info(
        "dataset staged",
        rows=read,
        shards=len(manifest.shards),
        rows_per_second=round(read / max(seconds, 1e-9)),
        staged=store.uri,
    )
    return StagedDataset(manifest, files, _concatenate(hashes))


def _load(manifest: Manifest, files: ShardFiles) -> StagedDataset:
    hashes = list(files.read_hashes(manifest.shards))
    return StagedDataset(manifest, files, _concatenate(hashes))


def _concatenate(pairs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.uint64)


@contextlib.contextmanager
def _dataset_lease(store: Store, check_stop: CheckStop) -> Iterator[Lease]:
    """Hold the dataset's lease, after waiting while another process stages the dataset."""
    logged = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(hold_lease(store, "this dataset", lambda why: None))
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


class _Stager:
    """One pass over the source."""

    def __init__(
        self,
        data: Data,
        rows: RowSource,
        files: ShardFiles,
        work: Path,
        check_stop: CheckStop,
        lease: Lease,
    ) -> None:
        self._data = data
        self._rows = rows
        self._files = files
        self._store = files.store
        self._work = work
        self._check_stop = check_stop
        self._lease = lease
        self._mapper = ExampleMapper(data)
        self._filter = RowFilter(data.checks, drop_duplicates=data.drop_duplicates)
        self._columns: list[str] = []
        self._shards: list[Shard] = []
        self._storing: Future[None] | None = None
        self._evicted = 0
        self.hashes: list[np.ndarray] = []
        """Hashes and groups of the examples so far, in order: uint64 `[2, examples]` each."""
        self.rows_read = 0

    def run(self) -> Manifest:
        """Stage the remaining rows and write the manifest."""
        self._shards = complete_shards(self._store)
        if self._shards:
            logs.get().info("resumed staging", shards=len(self._shards))
            for pair in self._files.read_hashes(self._shards):
                self._check_stop()
                self._filter.remember(*pair)
                self.hashes.append(pair)
        # One thread for each kind of work, so that everything stays in order.
        with contextlib.ExitStack() as stack:
            threads = _Threads(*(stack.enter_context(Threads(1)) for _ in range(4)))
            before = sum(shard.tally.raw for shard in self._shards)
            self._stage(threads, stack.enter_context(progress("rows", None, before)))
            if self._storing:
                self._storing.result()
        return self._finish()

    def _stage(self, threads: "_Threads", advance: Advance) -> None:
        shard = OpenShard(self._work, len(self._shards), threads.write)
        blocks = prefetch(self._blocks(), threads.read)
        for number, checked in delay(self._checked(blocks, threads.check), _PENDING_CHECKS):
            self._check_stop()
            if checked is None:  # the end of a file
                shard.file, shard.position = number + 1, FilePosition()
                continue
            if self._is_full(shard):
                shard = self._next(shard, threads)
            result = self._filter.apply(checked.stats, checked.flags.result(), *checked.hashes)
            self._count(shard.tally, checked, result)
            hashes = checked.hashes[:, result.keep]
            self.hashes.append(hashes)
            shard.write(checked.examples.take(result.keep), *hashes)
            shard.lengths.append(checked.stats.lengths[:, result.keep])
            shard.file, shard.position = number, checked.block.end
            self.rows_read += len(checked.block)
            advance(len(checked.block))
            self._require_examples(shard, _MAX_UNUSABLE_ROWS)
        self._require_examples(shard, 0)
        if shard.tally.raw:
            self._next(shard, threads)

    @staticmethod
    def _is_full(shard: "OpenShard") -> bool:
        return shard.tally.raw >= SHARD_ROWS or shard.tally.text_bytes >= SHARD_BYTES

    def _blocks(self) -> Iterator[tuple[int, Block | None]]:
        """Yield the blocks after the last complete shard, and None at the end of each file."""
        first, position = 0, FilePosition()
        if self._shards:
            first, position = self._shards[-1].file, self._shards[-1].position
        for number in range(first, len(self._rows.files)):
            file = self._rows.files[number]
            for block in read_blocks(file.fetch(), file.name, position, self._mapper.fields):
                yield number, block
            yield number, None
            position = FilePosition()

    def _checked(
        self, blocks: Iterator[tuple[int, Block | None]], thread: Threads
    ) -> Iterator[tuple[int, "_CheckedBlock | None"]]:
        """Make and check the examples of blocks; the flags follow from the thread."""
        for number, block in blocks:
            if block is None:
                yield number, None
            else:
                examples = to_columns(block, self._mapper)
                stats = text_stats(examples, self._data.checks)
                flags = thread.submit(find_flags, stats)
                yield number, _CheckedBlock(block, examples, stats, flags, content_hashes(stats))

    def _count(self, tally: RowTally, checked: "_CheckedBlock", result: FilterResult) -> None:
        block, examples, stats = checked.block, checked.examples, checked.stats
        tally.raw += len(block)
        tally.kept += int(result.keep.sum())
        reasons: dict[str, list[int]] = {}
        for row, reason in examples.dropped:
            reasons.setdefault(reason, []).append(row)
        for reason, mask in result.dropped.items():
            reasons.setdefault(reason, []).extend(examples.rows[mask].tolist())
        for reason, numbers in reasons.items():
            tally.drop(reason, len(numbers), functools.partial(_row, block, min(numbers)))
        for flag, mask in result.flagged.items():
            if mask.any():
                sample = functools.partial(excerpt, stats, int(np.flatnonzero(mask)[0]), flag)
                tally.flag(flag, int(mask.sum()), sample)
        tally.text_bytes += int(stats.text_bytes[result.keep].sum())
        if not self._columns and (rows := block.rows()):
            self._columns = sorted(rows[0])

    def _require_examples(self, shard: "OpenShard", after: int) -> None:
        """Raise a UsageError if none of the first rows, at least `after`, gives an example."""
        if not shard.number and not shard.tally.kept and shard.tally.raw >= after:
            raise UsageError(self._no_example_message(shard.tally))

    def _no_example_message(self, tally: RowTally) -> str:
        if not tally.raw:
            return f"data.dataset: {self._data.dataset} has no rows"
        most = sorted(tally.dropped.items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in most)
        change = "data.messages" if self._data.messages else "data.prompt and data.response"
        return (
            f"data: none of the first {tally.raw} rows of {self._data.dataset} can be used: "
            f"{reasons}; the columns are {', '.join(self._columns)}; change {change}"
        )

    def _next(self, shard: "OpenShard", threads: "_Threads") -> "OpenShard":
        """Close and store a shard in the background, and open the next one."""
        record = shard.close(self._files)
        if self._storing:
            self._storing.result()
        self._storing = threads.store.submit(self._store_shard, record, shard.path)
        return OpenShard(self._work, shard.number + 1, threads.write)

    def _store_shard(self, closing: Future[Shard], path: Path) -> None:
        record = closing.result()
        self._store.take(path, record.path)
        content = record.model_dump_json().encode()
        self._lease.check()
        self._store.write(record.path.replace(".parquet", ".json"), content)
        for file in self._rows.files[self._evicted : record.file]:
            file.evict()
        self._evicted = record.file
        self._shards.append(record)
        logs.get().info("shard staged", shard=record.path, rows=record.rows, bytes=record.bytes)

    def _finish(self) -> Manifest:
        tally = RowTally()
        for shard in self._shards:
            tally.merge(shard.tally)
        if not tally.kept:
            raise UsageError(self._no_example_message(tally))
        manifest = Manifest(
            dataset=self._data.dataset,
            revision=self._rows.revision,
            key=staging_key(self._data, self._rows),
            files=[
                FileInfo(name=file.name, bytes=file.bytes, identity=file.identity)
                for file in self._rows.files
            ],
            columns=self._mapper.fields,
            tally=tally,
            shards=self._shards,
        )
        self._lease.check()
        self._store.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest


def _row(block: Block, number: int) -> Row:
    return block.rows()[number]


@dataclass(frozen=True)
class _Threads:
    """One thread for each kind of work that runs in the background."""

    read: Threads
    check: Threads
    write: Threads
    store: Threads


class _CheckedBlock(NamedTuple):
    """A block of rows with its examples."""

    block: Block
    examples: ExampleColumns
    stats: TextStats
    flags: Future[Flags]
    hashes: np.ndarray
    """`filters.content_hashes`, uint64 `[2, examples]`."""
