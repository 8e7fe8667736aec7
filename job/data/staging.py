"""Rows stream from their source through checks into shards, in constant memory.

Hashes are Python's own work; reading, patterns, compression and uploads, which leave its lock
alone, go on beside it. Interrupted, staging goes on behind the last whole shard; shards end at
places that depend on the rows alone, so the result is the same.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from job.data.blocks import Block, Place
from job.data.columnar import ExampleColumns, to_columns
from job.data.dataset import (
    MANIFEST,
    FileInfo,
    Manifest,
    RowStats,
    Shard,
    ShardWriter,
    read_hashes,
    read_manifest,
    shard_key,
    shard_sha256,
    whole_shards,
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
from job.data.sources import RowSource
from job.errors import UsageError
from job.runtime import logs
from job.runtime.threads import Threads, delay, prefetch
from job.runtime.watchdog import WATCHDOG, Advance, progress
from job.spec.load import digest
from job.spec.schema import Data
from job.storage.base import Store
from job.storage.lease import Lease, LeaseHeldError, hold_lease

STAGING_VERSION = 3
"""Part of every key: raise it when what is staged from the same rows changes."""


SHARD_ROWS = 16_384


SHARD_BYTES = 64 * 1024 * 1024


_PATIENCE = 1000
"""Rows without a single usable one before the mapping is taken to be wrong."""


_LOOK_SECONDS = 2.0


_LOOKED_AHEAD = 2
"""Blocks whose patterns may still be looked for while the next are hashed."""


_TO_WRITE = 6
"""Blocks that may wait to be written: a row group is compressed at once."""


Check = Callable[[], None]


def staging_key(data: Data, rows: RowSource) -> str:
    """Names what is staged by all that it depends on."""
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
    store: Store
    hashes: np.ndarray
    """Hashes and groups of all examples, uint64 `[2, examples]`."""


def stage_rows(data: Data, rows: RowSource, store: Store, work: Path, stop: Check) -> StagedDataset:
    """Stage a source, or find that it was staged before.

    Args:
        store: where the dataset of this key is kept.
        work: a scratch folder.
        stop: called now and then; it may raise.

    Raises:
        UsageError: no row can be used.
        JobError: the source or the store fails.
    """
    if found := read_manifest(store):
        logs.get().info("staged before", dataset=data.dataset, rows=found.rows, staged=store.uri)
        return _found(found, store, work)
    with _alone(store, stop) as lease:
        if found := read_manifest(store):
            return _found(found, store, work)
        clock = time.monotonic()
        stager = _Stager(data, rows, store, work, stop, lease)
        manifest = stager.run()
        seconds = time.monotonic() - clock
    hashes, read = stager.hashes, stager.rows_read
    del stager  # what it knows of duplicates is as large as the hashes
    logs.get().info(
        "staged",
        rows=read,
        shards=len(manifest.shards),
        rows_per_second=round(read / max(seconds, 1e-9)),
        staged=store.uri,
    )
    return StagedDataset(manifest, store, _together(hashes))


def _found(manifest: Manifest, store: Store, work: Path) -> StagedDataset:
    return StagedDataset(
        manifest, store, _together(list(read_hashes(store, manifest.shards, work)))
    )


def _together(pairs: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.uint64)


@contextlib.contextmanager
def _alone(store: Store, stop: Check) -> Iterator[Lease]:
    """Hold the dataset's lease; while another run stages the same, wait for it."""
    said = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lease = stack.enter_context(hold_lease(store, "this dataset", lambda why: None))
                break
            except LeaseHeldError as busy:
                if not said:
                    logs.get().info("waiting for another run that stages this", why=str(busy))
                said = True
            until = time.monotonic() + _LOOK_SECONDS
            while time.monotonic() < until:
                stop()
                WATCHDOG.beat()
                time.sleep(0.1)
        yield lease


class _Stager:
    """One pass over the source."""

    def __init__(
        self, data: Data, rows: RowSource, store: Store, work: Path, stop: Check, lease: Lease
    ) -> None:
        self._lease = lease
        self._data = data
        self._rows = rows
        self._store = store
        self._work = work
        self._stop = stop
        self._mapper = ExampleMapper(data)
        self._judge = RowFilter(data.checks, drop_duplicates=data.drop_duplicates)
        self._columns: list[str] = []
        self._shards: list[Shard] = []
        self._pending: Future[None] | None = None
        self._put_away = 0
        self.hashes: list[np.ndarray] = []
        """Hashes and groups of what was kept, uint64 `[2, examples]`, in order."""
        self.rows_read = 0

    def run(self) -> Manifest:
        """Read what is not staged yet, and write the manifest."""
        self._shards = whole_shards(self._store)
        if self._shards:
            logs.get().info("resumed staging", shards=len(self._shards))
            for pair in read_hashes(self._store, self._shards, self._work):
                self._stop()
                self._judge.remember(*pair)
                self.hashes.append(pair)
        # A thread for each kind of work, so that everything comes in order.
        with contextlib.ExitStack() as stack:
            threads = _Threads(*(stack.enter_context(Threads(1)) for _ in range(4)))
            before = sum(shard.tally.raw for shard in self._shards)
            self._read(threads, stack.enter_context(progress("rows", None, before)))
            if self._pending:
                self._pending.result()
        return self._finish()

    def _read(self, threads: "_Threads", advance: Advance) -> None:
        shard = _Open(self._work, len(self._shards), threads.write)
        blocks = prefetch(self._blocks(), threads.read)
        for number, seen in delay(self._looked_at(blocks, threads.look), _LOOKED_AHEAD):
            self._stop()
            if seen is None:  # the end of a file
                shard.file, shard.place = number + 1, Place()
                continue
            if self._is_full(shard):
                shard = self._next(shard, threads)
            fate = self._judge.decide(seen.looked, seen.faults.result(), *seen.hashes)
            self._count(shard.tally, seen, fate)
            hashes = seen.hashes[:, fate.kept]
            self.hashes.append(hashes)
            shard.write(seen.mapped.take(fate.kept), *hashes)
            shard.lengths.append(seen.looked.lengths[:, fate.kept])
            shard.file, shard.place = number, seen.block.end
            self.rows_read += len(seen.block)
            advance(len(seen.block))
            self._give_up(shard, _PATIENCE)
        self._give_up(shard, 0)
        if shard.tally.raw:
            self._next(shard, threads)

    @staticmethod
    def _is_full(shard: "_Open") -> bool:
        return shard.tally.raw >= SHARD_ROWS or shard.tally.text_bytes >= SHARD_BYTES

    def _blocks(self) -> Iterator[tuple[int, Block | None]]:
        """All blocks behind the last whole shard, and None behind the last of each file."""
        first, place = 0, Place()
        if self._shards:
            first, place = self._shards[-1].file, self._shards[-1].place
        for number in range(first, len(self._rows.files)):
            file = self._rows.files[number]
            for block in read_blocks(file.bring(), file.name, place, self._mapper.fields):
                yield number, block
            yield number, None
            place = Place()

    def _looked_at(
        self, blocks: Iterator[tuple[int, Block | None]], thread: Threads
    ) -> Iterator[tuple[int, "_Seen | None"]]:
        """The same with the examples of each block, and what is seen in them."""
        for number, block in blocks:
            if block is None:
                yield number, None
            else:
                mapped = to_columns(block, self._mapper)
                looked = text_stats(mapped, self._data.checks)
                faults = thread.submit(find_flags, looked)
                yield number, _Seen(block, mapped, looked, faults, content_hashes(looked))

    def _count(self, tally: RowStats, seen: "_Seen", fate: FilterResult) -> None:
        block, mapped, looked = seen.block, seen.mapped, seen.looked
        tally.raw += len(block)
        tally.kept += int(fate.kept.sum())
        reasons: dict[str, list[int]] = {}
        for row, reason in mapped.dropped:
            reasons.setdefault(reason, []).append(row)
        for reason, mask in fate.dropped.items():
            reasons.setdefault(reason, []).extend(mapped.rows[mask].tolist())
        for reason, numbers in reasons.items():
            shown = "" if tally.knows(reason) else block.rows()[min(numbers)]
            tally.drop(reason, len(numbers), shown)
        for fault, mask in fate.found.items():
            if mask.any():
                first = int(np.flatnonzero(mask)[0])
                shown = "" if tally.knows(fault) else excerpt(looked, first, fault)
                tally.find(fault, int(mask.sum()), shown)
        tally.text_bytes += int(looked.size[fate.kept].sum())
        if not self._columns and (rows := block.rows()):
            self._columns = sorted(rows[0])

    def _give_up(self, shard: "_Open", after: int) -> None:
        """Keep nothing of a dataset whose first rows, so many, give no example."""
        if not shard.number and not shard.tally.kept and shard.tally.raw >= after:
            raise UsageError(self._why_none(shard.tally))

    def _why_none(self, tally: RowStats) -> str:
        if not tally.raw:
            return f"data.dataset: {self._data.dataset} has no rows"
        most = sorted(tally.dropped.items(), key=lambda item: -item[1])[:3]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in most)
        change = "data.messages" if self._data.messages else "data.prompt and data.response"
        return (
            f"data: none of the first {tally.raw} rows of {self._data.dataset} can be used: "
            f"{reasons}; the columns are {', '.join(self._columns)}; change {change}"
        )

    def _next(self, shard: "_Open", threads: "_Threads") -> "_Open":
        """Let a shard be closed and kept in the background; the next one."""
        closing = shard.close()
        if self._pending:
            self._pending.result()
        self._pending = threads.keep.submit(self._keep, closing, shard.path)
        return _Open(self._work, shard.number + 1, threads.write)

    def _keep(self, closing: Future[Shard], path: Path) -> None:
        record = closing.result()
        self._store.take(path, record.path)
        content = record.model_dump_json().encode()
        self._lease.check()
        self._store.write(record.path.replace(".parquet", ".json"), content)
        for file in self._rows.files[self._put_away : record.file]:
            file.discard()
        self._put_away = record.file
        self._shards.append(record)
        logs.get().info("shard staged", shard=record.path, rows=record.rows, bytes=record.bytes)

    def _finish(self) -> Manifest:
        tally = RowStats()
        for shard in self._shards:
            tally.join(shard.tally)
        if not tally.kept:
            raise UsageError(self._why_none(tally))
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


@dataclass(frozen=True)
class _Threads:
    """One thread for each kind of work that goes on beside Python's own."""

    read: Threads
    look: Threads
    write: Threads
    keep: Threads


class _Seen(NamedTuple):
    """A block, its examples, and what is seen in them."""

    block: Block
    mapped: ExampleColumns
    looked: TextStats
    faults: Future[Flags]
    hashes: np.ndarray
    """Those of `checks.hashes_of`."""


class _Open:
    """The shard that is being written."""

    def __init__(self, work: Path, number: int, thread: Threads) -> None:
        self.number = number
        self.path = work / shard_key(number, "parquet")
        self.tally = RowStats()
        self.file = 0
        self.place = Place()
        self.lengths: list[np.ndarray] = []
        """Characters of the prompts and of the responses that are kept, int `[2, examples]`."""
        self._thread = thread
        self._writer: ShardWriter | None = None
        self._waiting: deque[Future[None]] = deque()

    def write(self, mapped: ExampleColumns, hashes: np.ndarray, groups: np.ndarray) -> None:
        """Add examples, compressed beside the work on the next."""
        if self._writer is None:
            self._writer = ShardWriter(self.path)
        while len(self._waiting) >= _TO_WRITE:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._writer.write, mapped, hashes, groups))

    def close(self) -> Future[Shard]:
        """Finish the file behind what is waiting to be written; its record, when that is done."""
        return self._thread.submit(self._finish)

    def _finish(self) -> Shard:
        for written in self._waiting:
            written.result()
        if self._writer:
            self._writer.close()
        if self.lengths:
            prompts, responses = np.concatenate(self.lengths, axis=1)
            self.tally.prompt.add(prompts)
            self.tally.response.add(responses)
        return Shard(
            path=shard_key(self.number, "parquet"),
            bytes=self.path.stat().st_size,
            sha256=shard_sha256(self.path),
            rows=self.tally.kept,
            tally=self.tally,
            file=self.file,
            offset=self.place.offset,
            line=self.place.line,
        )
