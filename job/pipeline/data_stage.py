"""The data stage: rows staged once for all runs, and this run's sample of them."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from job.data.columnar import HISTORY, example_from_columns
from job.data.contamination import clean_rows
from job.data.dataset import READERS, Shard, close_shard, open_shard
from job.data.examples import Example
from job.data.filters import CHAT_MARKUP, CONTAMINATED
from job.data.sources import open_source
from job.data.split import split
from job.data.staging import StagedDataset, stage_rows, staging_key
from job.evals.tasks import load_task
from job.pipeline.run import Run
from job.results import DataInfo, RowCounts
from job.runtime import logs
from job.runtime.threads import Threads, prefetch_map
from job.storage.locations import child_uri, open_store

TRAIN = "data/train.parquet"


VALIDATION = "data/validation.parquet"


MANIFEST = "data/manifest.json"


_PIECE_ROWS = 16_384
"""Examples that are put in order at once."""


_TEXTS = ("id", "system", "prompt", "response")


_SCHEMA = pa.schema([*((name, pa.string()) for name in _TEXTS), ("history", HISTORY)])


def run_stage(run: Run) -> DataInfo:
    """Stage the dataset of the spec and write what training and evaluation use.

    Raises:
        UsageError: the templates do not fit the rows, or there are too few.
    """
    data = run.spec.data
    rows = open_source(data, "dialogues", run.revisions)
    clock = time.monotonic()
    where = child_uri(child_uri(run.spec.output, "datasets"), staging_key(data, rows))
    staged = stage_rows(data, rows, open_store(where), run.work, run.stop.check)
    manifest = staged.manifest
    hashes, groups = staged.hashes
    clean = None
    dropped = dict(manifest.tally.dropped)
    if CONTAMINATED in data.checks.drop:
        questions = (
            question.text
            for entry in run.spec.evals.multiple_choice
            for question in load_task(entry, run.revisions).questions
        )
        clean = clean_rows(questions, staged, run.work, run.stop.check)
        dropped[CONTAMINATED] = int((~clean).sum())
        hashes, groups = hashes[clean], groups[clean]
    chosen = split(run.spec.seed, hashes, groups, data.train_examples, data.validation_examples)
    wanted = {TRAIN: chosen.train, VALIDATION: chosen.validation}
    if clean is not None:
        wanted = {key: np.flatnonzero(clean)[numbers] for key, numbers in wanted.items()}
    for key, path in _write_samples(run, staged, wanted).items():
        run.put_file(key, path)
    info = DataInfo(
        dataset=data.dataset,
        revision=rows.revision,
        rows=RowCounts(
            raw=manifest.tally.raw,
            valid=len(hashes),
            dropped=dict(sorted(item for item in dropped.items() if item[1])),
        ),
        train=len(chosen.train),
        validation=len(chosen.validation),
        neutralised=manifest.tally.found.get(CHAT_MARKUP, 0),
        found=dict(sorted(manifest.tally.found.items())),
    )
    run.put(MANIFEST, json.dumps(_manifest(run, staged, info), indent=2).encode())
    seconds = time.monotonic() - clock
    logs.get().info(
        "rows read and sampled",
        raw=info.rows.raw,
        valid=info.rows.valid,
        dropped=info.rows.dropped,
        found=info.found,
        train=info.train,
        validation=info.validation,
        rows_per_second=round(info.rows.raw / max(seconds, 1e-9)),
    )
    return info


def _write_samples(
    run: Run, staged: StagedDataset, wanted: Mapping[str, np.ndarray]
) -> dict[str, Path]:
    """For each key a Parquet file of the examples with these numbers, in this order.

    One pass over the shards deals the examples into pieces of the final order, each small
    enough to be sorted in memory. The same examples give the same bytes.
    """
    deals = {key: _Deal(run.work / Path(key).name, numbers) for key, numbers in wanted.items()}
    everything = np.sort(np.concatenate(list(wanted.values())))
    parts = [part for part in _by_shard(staged, everything) if len(part[2])]

    def pick(part: tuple[Shard, int, np.ndarray]) -> pa.Table:
        shard, first, numbers = part
        return _pick(run, staged, shard, numbers - first)

    with Threads(READERS) as pool:
        picks = prefetch_map(pick, parts, pool, READERS)
        for (_, _, numbers), picked in zip(parts, picks, strict=True):
            run.stop.check()
            for deal in deals.values():
                deal.add(picked, numbers)
    return {key: deal.write() for key, deal in deals.items()}


def _by_shard(
    staged: StagedDataset, numbers: np.ndarray
) -> Iterator[tuple[Shard, int, np.ndarray]]:
    """Each shard, the number of its first example, and those of `numbers`, sorted, in it."""
    first = 0
    for shard in staged.manifest.shards:
        low, high = np.searchsorted(numbers, [first, first + shard.rows])
        yield shard, first, numbers[low:high]
        first += shard.rows


class _Deal:
    """One sample on its way into its order."""

    def __init__(self, path: Path, wanted: np.ndarray) -> None:
        self._path = path
        self._order = np.argsort(wanted, kind="stable")
        self._numbers = wanted[self._order]
        count = -(-len(wanted) // _PIECE_ROWS)
        self._pieces = [_Piece(path.with_name(f"{path.name}.{n}")) for n in range(count)]

    def add(self, table: pa.Table, numbers: np.ndarray) -> None:
        """Take what is wanted of the examples with these numbers, which grow."""
        low, high = np.searchsorted(self._numbers, [numbers[0], numbers[-1] + 1])
        rows = np.searchsorted(numbers, self._numbers[low:high])
        places = self._order[low:high]
        for number in np.unique(places // _PIECE_ROWS):
            mask = places // _PIECE_ROWS == number
            self._pieces[number].add(table.take(pa.array(rows[mask])), places[mask])

    def write(self) -> Path:
        """All of them as one file."""
        with pq.ParquetWriter(self._path, _SCHEMA, compression="zstd") as writer:
            for piece in self._pieces:
                writer.write_table(piece.sorted())
        return self._path


def _pick(run: Run, staged: StagedDataset, shard: Shard, rows: np.ndarray) -> pa.Table:
    path = open_shard(staged.store, shard, run.work)
    found: list[pa.RecordBatch] = []
    with pq.ParquetFile(path) as file:
        first = 0
        for batch in file.iter_batches(4096):
            low, high = np.searchsorted(rows, [first, first + batch.num_rows])
            if high > low:
                found.append(batch.take(pa.array(rows[low:high] - first)))
            first += batch.num_rows
    close_shard(path, run.work)
    table = pa.Table.from_batches(found)
    raw = table["hash"].to_numpy().tobytes().hex()
    identities = [raw[at : at + 16] for at in range(0, len(raw), 16)]
    columns = [pa.array(identities), *(table[name] for name in _SCHEMA.names[1:])]
    return pa.table(columns, schema=_SCHEMA)


class _Piece:
    """A piece of the final order, gathered in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def add(self, table: pa.Table, places: np.ndarray) -> None:
        """Examples, and where each belongs."""
        table = table.append_column("place", pa.array(places))
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(str(self._path), table.schema)
        self._writer.write_table(table)

    def sorted(self) -> pa.Table:
        """All of them in order; the file is removed."""
        self._writer.close()
        with pyarrow.ipc.open_file(str(self._path)) as reader:
            table = reader.read_all()
        self._path.unlink()
        return table.sort_by("place").drop_columns(["place"]).combine_chunks()


def _manifest(run: Run, staged: StagedDataset, info: DataInfo) -> dict[str, Any]:
    tally = staged.manifest.tally
    return info.model_dump(mode="json") | {
        "examples": dict(sorted(tally.shown.items())),
        "characters": {
            "prompt": tally.prompt.percentiles(),
            "response": tally.response.percentiles(),
        },
        "text_bytes": tally.text_bytes,
        "columns": staged.manifest.columns,
        "files": [file.model_dump() for file in staged.manifest.files],
        "staged": staged.store.uri,
        "shards": [
            {"path": s.path, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256}
            for s in staged.manifest.shards
        ],
        "seed": run.spec.seed,
    }


def read_examples(run: Run, key: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file that this stage wrote."""
    path = run.fetch(key)
    return list(_first(iter_examples(path), limit))


def iter_examples(path: Path) -> Iterator[Example]:
    """The examples of a local copy of such a file, one after the other."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                yield example_from_columns(**row)


def _first(examples: Iterator[Example], limit: int | None) -> Iterator[Example]:
    for number, example in enumerate(examples):
        if number == limit:
            return
        yield example
