"""Choices and loglikelihoods equal lm-evaluation-harness's on the same tiny checkpoint.

The questions are those shipped with the package; a Parquet file of real ones, in MedMCQA's
columns, replaces them if the environment variable MEDMCQA_FILE names it.
"""

import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh

from job.evals.engine import Engine
from job.evals.tasks import letter_context, load_task, question_prompts
from job.model.load import load_model
from job.model.tiny import VOCABULARY, train_tokenizer
from job.spec.schema import Model, MultipleChoiceEval
from tests.peers import run_peer

pytestmark = pytest.mark.slow
MAX_QUESTIONS = 300
EXAMPLES = 3
COLUMNS = ["opa", "opb", "opc", "opd"]
TOLERANCE = 1e-3


def rows() -> list[dict[str, Any]]:
    if path := os.environ.get("MEDMCQA_FILE"):
        table = pq.read_table(path, columns=["question", "cop", *COLUMNS])
        return table.slice(0, MAX_QUESTIONS + EXAMPLES).to_pylist()
    text = (resources.files("job") / "samples" / "questions.jsonl").read_text("utf-8")
    columns = ("question", "cop", *COLUMNS)
    return [{key: row[key] for key in columns} for row in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("few_shot", [0, EXAMPLES])
def test_loglikelihoods_equal_those_of_the_harness(tmp_path: Path, few_shot: int) -> None:
    run_peer("make_models.py", tmp_path, VOCABULARY, "gemma3")
    folder = tmp_path / "gemma3"
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    data = tmp_path / "data"
    data.mkdir()
    examples, scored = rows()[:EXAMPLES], rows()[EXAMPLES:]
    for name, split in (("train", examples), ("validation", scored)):
        lines = "".join(json.dumps(row) + "\n" for row in split)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    run_peer(
        "harness.py", folder, data / "validation.jsonl", data / "train.jsonl", few_shot,
        tmp_path / "theirs.json",
    )  # fmt: skip
    theirs = np.array(json.loads((tmp_path / "theirs.json").read_text()))

    entry = MultipleChoiceEval(
        name="medmcqa", dataset=str(data), data_files=["validation.jsonl"], options=COLUMNS,
        answer="cop", prompt="lm-eval",
        few_shot={"examples": few_shot, "data_files": ["train.jsonl"]} if few_shot else None,
    )  # fmt: skip
    task = load_task(entry)
    model = load_model(
        Model(preset=str(folder), dtype="float32"), 0,
        Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")),
    )  # fmt: skip
    engine = Engine(model, 16, 4096)
    prompts, truncated = engine.encode(question_prompts(task))
    assert truncated == 0
    letters = model.tokenizer.letter_tokens("ABCD", *letter_context(entry))
    ours = engine.loglikelihood(model.weights, prompts, letters, "medmcqa")

    assert len(task.questions) == len(scored) == len(theirs)
    sys.stdout.write(f"{len(scored)} questions: at most {np.abs(ours - theirs).max():.1e} apart\n")
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    assert len(set(ours.argmax(axis=1).tolist())) > 1
