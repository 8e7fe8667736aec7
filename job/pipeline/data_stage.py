"""The data stage: stage the dataset once for all runs, and write this run's sample of it."""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from job.chat.conversation import Conversation
from job.data.contamination import clean_rows
from job.data.dataset import StagedDataset
from job.data.examples import Example, ExampleMapper
from job.data.filters import CHAT_MARKUP, CONTAMINATED
from job.data.sources import RowSource, open_source
from job.data.split import split
from job.data.split_files import iter_examples, renderable_rows, write_split_files
from job.data.staging import stage_rows, staging_key
from job.errors import UsageError
from job.evals.tasks import load_task
from job.pipeline.layout import DATA_MANIFEST, TRAIN_EXAMPLES, VALIDATION_EXAMPLES
from job.pipeline.run import Run
from job.results import DataInfo
from job.runtime import logs
from job.scores import RowCounts
from job.storage.locations import child_uri, open_store

if TYPE_CHECKING:
    from job.chat.renderer import ChatRenderer


def run_stage(run: Run) -> DataInfo:
    """Stage the dataset of the spec and write the examples for training and evaluation.

    Raises:
        UsageError: the templates do not fit the rows, or too few rows can be used.
    """
    data = run.spec.data
    rows = open_source(data, "dialogues", run.revisions)
    clock = time.monotonic()
    uri = child_uri(child_uri(run.spec.output, "datasets"), staging_key(data, rows))
    staged = stage_rows(data, rows, open_store(uri), run.work, run.stop.check)
    tally = staged.manifest.tally
    usable, reasons = renderable_rows(staged, _unrenderable(run), run.stop.check)
    if not usable.any():
        raise UsageError(f"data: no example can be rendered: {', '.join(reasons)}")
    dropped = Counter(tally.dropped) + reasons
    if CONTAMINATED in data.checks.drop:
        questions = (
            question.text
            for entry in run.spec.evals.multiple_choice
            for question in load_task(entry, run.revisions).questions
        )
        clean = clean_rows(questions, staged, run.stop.check)
        dropped[CONTAMINATED] = int((usable & ~clean).sum())
        usable &= clean
    numbers = np.flatnonzero(usable)
    hashes = staged.hashes()[:, numbers]
    chosen = split(run.spec.seed, hashes, data.train_examples, data.validation_examples)
    parts = {TRAIN_EXAMPLES: chosen.train, VALIDATION_EXAMPLES: chosen.validation}
    samples = {key: numbers[indices] for key, indices in parts.items()}
    paths = {key: run.work / Path(key).name for key in samples}
    write_split_files(staged, {paths[key]: samples[key] for key in samples}, run.stop.check)
    for key, path in paths.items():
        run.put_file(key, path)
    info = DataInfo(
        dataset=data.dataset,
        revision=rows.revision,
        rows=RowCounts(
            raw=tally.raw,
            valid=hashes.shape[1],
            dropped=dict(sorted(item for item in dropped.items() if item[1])),
        ),
        train=len(chosen.train),
        validation=len(chosen.validation),
        grouped_by=data.group,
        left_out=chosen.left_out,
        shared_prompts=chosen.shared_prompts,
        neutralised=tally.found.get(CHAT_MARKUP, 0),
        found=dict(sorted(tally.found.items())),
    )
    run.put(DATA_MANIFEST, json.dumps(_manifest(run, rows, staged, info), indent=2).encode())
    seconds = time.monotonic() - clock
    logs.get().info(
        "data split written",
        raw=info.rows.raw,
        valid=info.rows.valid,
        dropped=info.rows.dropped,
        flagged=info.found,
        train=info.train,
        validation=info.validation,
        left_out=info.left_out,
        shared_prompts=info.shared_prompts,
        rows_per_second=round(info.rows.raw / max(seconds, 1e-9)),
    )
    return info


def _unrenderable(run: Run) -> Callable[[Conversation], str | None]:
    """Return a function that says why the model's chat template cannot render a conversation."""

    @functools.cache
    def renderer() -> "ChatRenderer":
        from job.model.load import load_chat_tokenizer, resolve_preset

        preset = resolve_preset(run.spec.model, run.revisions)
        return load_chat_tokenizer(run.spec.model, preset).renderer

    return lambda messages: renderer().unrenderable(messages)


def _manifest(run: Run, rows: RowSource, staged: StagedDataset, info: DataInfo) -> dict[str, Any]:
    tally = staged.manifest.tally
    return info.model_dump(mode="json") | {
        "examples": dict(sorted(tally.shown.items())),
        "text_bytes": tally.text_bytes,
        "columns": ExampleMapper(run.spec.data).fields,
        "files": [{"name": f.name, "bytes": f.bytes, "identity": f.identity} for f in rows.files],
        "staged": staged.store.uri,
        "shards": [
            {"path": s.path, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256}
            for s in staged.manifest.shards
        ],
        "seed": run.spec.seed,
    }


def read_examples(run: Run, key: str) -> list[Example]:
    """Return the training or validation examples, by the key of their file."""
    return list(iter_examples(run.fetch(key)))
