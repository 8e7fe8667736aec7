"""The same choices and log-likelihoods as lm-evaluation-harness, on the same tiny checkpoint.

The questions are those shipped with the package; a Parquet file of real ones, in MedMCQA's
columns, takes their place where the environment variable MEDMCQA_FILE names it.
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
from job.evals.tasks import before_letter, load_task, question_prompts
from job.model.load import load_model
from job.model.tiny import VOCABULARY, train_tokenizer
from job.spec.schema import Model, MultipleChoiceEval
from tests.peers import run_peer

pytestmark = pytest.mark.slow

MOST = 300
SHOTS = 3
COLUMNS = ["opa", "opb", "opc", "opd"]
WITHIN = 1e-3


def rows() -> list[dict[str, Any]]:
    if path := os.environ.get("MEDMCQA_FILE"):
        table = pq.read_table(path, columns=["question", "cop", *COLUMNS])
        return table.slice(0, MOST + SHOTS).to_pylist()
    text = (resources.files("job") / "samples" / "questions.jsonl").read_text("utf-8")
    wanted = ("question", "cop", *COLUMNS)
    return [{key: row[key] for key in wanted} for row in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("shots", [0, SHOTS])
def test_choices_and_log_likelihoods_are_those_of_the_harness(tmp_path: Path, shots: int) -> None:
    run_peer("make_models.py", tmp_path, VOCABULARY, "gemma3")
    folder = tmp_path / "gemma3"
    (folder / "tokenizer.model").write_bytes(train_tokenizer())
    data = tmp_path / "data"
    data.mkdir()
    solved, asked = rows()[:SHOTS], rows()[SHOTS:]
    for name, part in (("train", solved), ("validation", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    run_peer(
        "harness.py", folder, data / "validation.jsonl", data / "train.jsonl", shots,
        tmp_path / "theirs.json",
    )  # fmt: skip
    theirs = np.array(json.loads((tmp_path / "theirs.json").read_text()))

    entry = MultipleChoiceEval(
        name="medmcqa", dataset=str(data), data_files=["validation.jsonl"], options=COLUMNS,
        answer="cop", prompt="lm-eval",
        few_shot={"examples": shots, "data_files": ["train.jsonl"]} if shots else None,
    )  # fmt: skip
    found = load_task(entry)
    model = load_model(
        Model(preset=str(folder), dtype="float32"), 0,
        Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model")),
    )  # fmt: skip
    engine = Engine(model, 16, 4096)
    prompts, cut = engine.encode(question_prompts(found))
    assert cut == 0
    letters = model.codec.letter_tokens("ABCD", *before_letter(entry))
    ours = engine.loglikelihood(model.weights, prompts, letters, "medmcqa")

    assert len(found.questions) == len(asked) == len(theirs)
    sys.stdout.write(f"{len(asked)} questions: at most {np.abs(ours - theirs).max():.1e} apart\n")
    np.testing.assert_allclose(ours, theirs, atol=WITHIN)
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).all()
    assert len(set(ours.argmax(axis=1).tolist())) > 1
