"""The data stage: rows read, checked, sampled, and kept with a manifest of what was done."""

import io
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job import logs
from job.data.chat import neutralise
from job.data.examples import Dropped, Example, ExampleMapper
from job.data.sampling import Sampler
from job.data.sources import Row, open_rows
from job.errors import UsageError
from job.results import DataInfo, RowCounts
from job.run import Run

TRAIN = "data/train.parquet"
VALIDATION = "data/validation.parquet"
MANIFEST = "data/manifest.json"

_PATIENCE = 1000
"""Rows without a single usable one before the mapping is taken to be wrong."""

_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "system", "prompt", "response")])


def run_stage(run: Run) -> DataInfo:
    """Read the dataset of the spec and write what training and evaluation use.

    Raises:
        UsageError: the templates do not fit the rows, or there are too few.
    """
    data = run.spec.data
    rows = open_rows(data, "dialogues", run.revisions)
    to_example = ExampleMapper(data)
    sampler = Sampler(run.spec.seed, data.train_examples, data.validation_examples)
    tally = _Tally()
    seen: set[str] = set()
    clock = time.monotonic()
    for row in rows:
        tally.raw += 1
        if tally.raw % 256 == 0:
            run.stop.check()
        try:
            example = to_example(row)
            if data.drop_duplicates:
                if example.id in seen:
                    raise Dropped("duplicate")
                seen.add(example.id)
        except Dropped as dropped:
            tally.drop(str(dropped), row)
            if tally.raw >= _PATIENCE and not tally.valid:
                break
            continue
        tally.keep(example)
        sampler.add(example)
    if not tally.valid:
        raise UsageError(tally.why_none(data.dataset))
    split = sampler.split()
    seconds = time.monotonic() - clock
    run.put(TRAIN, to_parquet(split.train))
    run.put(VALIDATION, to_parquet(split.validation))
    info = DataInfo(
        dataset=data.dataset,
        revision=rows.revision,
        rows=RowCounts(
            raw=tally.raw, valid=tally.valid, dropped=dict(sorted(tally.dropped.items()))
        ),
        train=len(split.train),
        validation=len(split.validation),
        neutralised=tally.neutralised,
    )
    manifest = info.model_dump(mode="json") | {
        "dropped_examples": tally.shown,
        "characters": {
            "prompt": _percentiles(len(example.prompt) for example in split.train),
            "response": _percentiles(len(example.response) for example in split.train),
        },
        "seed": run.spec.seed,
    }
    run.put(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode())
    logs.get().info(
        "rows read and sampled",
        raw=tally.raw,
        valid=tally.valid,
        dropped=dict(tally.dropped),
        train=info.train,
        validation=info.validation,
        rows_per_second=round(tally.raw / max(seconds, 1e-9)),
    )
    return info


class _Tally:
    """What became of the rows."""

    def __init__(self) -> None:
        self.raw = 0
        self.valid = 0
        self.neutralised = 0
        self.dropped: Counter[str] = Counter()
        self.shown: dict[str, str] = {}
        self._columns: list[str] = []

    def drop(self, reason: str, row: Row) -> None:
        self.dropped[reason] += 1
        self._columns = self._columns or sorted(row)
        if reason not in self.shown:
            self.shown[reason] = json.dumps(row, default=str)[:300]

    def keep(self, example: Example) -> None:
        self.valid += 1
        texts = (example.system or "", example.prompt, example.response)
        if any("<" in text or "[" in text for text in texts):
            self.neutralised += any(neutralise(text) != text for text in texts)

    def why_none(self, dataset: str) -> str:
        if not self.raw:
            return f"data.dataset: {dataset} has no rows"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common(3))
        return (
            f"data: none of the first {self.raw} rows of {dataset} can be used: {reasons}; "
            f"the columns are {', '.join(self._columns)}; change data.prompt and data.response"
        )


def to_parquet(examples: list[Example]) -> bytes:
    """Examples as a Parquet file, the same bytes for the same examples."""
    table = pa.Table.from_pylist([asdict(example) for example in examples], schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_examples(run: Run, key: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a file that this stage wrote."""
    rows = pq.read_table(run.fetch(key)).to_pylist()
    return [Example(**row) for row in rows[:limit]]


def _percentiles(lengths: Iterable[int]) -> dict[str, Any]:
    values = np.fromiter(lengths, dtype=np.int64)
    marks = np.percentile(values, (50, 90, 99, 100))
    names = ("p50", "p90", "p99", "max")
    return {"mean": round(float(values.mean()), 1)} | {
        name: int(mark) for name, mark in zip(names, marks, strict=True)
    }
