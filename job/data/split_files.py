"""Split files: the training or held-out examples of a staged dataset, as Parquet, in their order.

The same examples give the same bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job.chat.conversation import Conversation
from job.data.columnar import COLUMNS, example_from_columns, messages_from_json
from job.data.dataset import GROUP_ROWS, StagedDataset
from job.data.examples import Example
from job.errors import StageError

_SCHEMA = pa.schema([(name, pa.large_string()) for name in ("id", *COLUMNS.names)])
"""Columns of a split file; all of its texts together may be longer than 2 GB."""


def iter_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of a split file.

    Raises:
        StageError: an earlier version wrote a dialogue in it.
    """
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                if row.pop("history", None):
                    raise StageError(
                        f"{path.name} is of an earlier version, which kept dialogues in another "
                        "way; run the job again with --fresh"
                    )
                yield example_from_columns(**row)


def renderable_rows(
    staged: StagedDataset,
    unrenderable: Callable[[Conversation], str | None],
    check_stop: Callable[[], None],
) -> tuple[np.ndarray, Counter[str]]:
    """Return which examples can be rendered, bool `[examples]`, and the reasons of the others."""
    renderable = np.ones(staged.manifest.rows, bool)
    reasons: Counter[str] = Counter()
    if not staged.manifest.tally.with_messages:
        return renderable, reasons
    for first, batch in staged.batches(["messages"]):
        check_stop()
        for number, text in enumerate(batch["messages"].to_pylist(), first):
            example = Example("", messages_from_json(text)) if text else None
            if example is None or example.is_plain:
                continue  # every template renders plain examples
            if reason := unrenderable(example.messages):
                renderable[number] = False
                reasons[reason] += 1
    return renderable, reasons


def write_split_files(
    staged: StagedDataset, splits: Mapping[Path, np.ndarray], check_stop: Callable[[], None]
) -> None:
    """Write split files.

    Args:
        staged: the dataset.
        splits: for each file the indices of its examples, int64, in their order.
        check_stop: called for each batch; it may raise.
    """
    chosen = np.sort(np.concatenate(list(splits.values())))
    batches: list[pa.RecordBatch] = []
    for first, batch in staged.batches(["hash", *COLUMNS.names]):
        check_stop()
        low, high = np.searchsorted(chosen, [first, first + batch.num_rows])
        batches.append(batch.take(pa.array(chosen[low:high] - first)))
    table = pa.Table.from_batches(batches)
    batches.clear()
    raw = table["hash"].to_numpy().tobytes().hex()
    ids = [raw[at : at + 16] for at in range(0, len(raw), 16)]
    texts = (table[name].cast(pa.large_string()) for name in COLUMNS.names)
    table = pa.table([pa.array(ids, pa.large_string()), *texts], _SCHEMA).combine_chunks()
    for path, indices in splits.items():
        order = np.searchsorted(chosen, indices)
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for at in range(0, len(order), GROUP_ROWS):
                writer.write_table(table.take(pa.array(order[at : at + GROUP_ROWS])))
