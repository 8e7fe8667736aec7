"""The verdict is the truth: a model that learnt, one that could not, and one taught wrong answers.

Questions name their letter by a word, which a tiny random model can learn from other questions
that do; it is asked about questions it has not seen.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.results import Results
from tests.command import job

pytestmark = pytest.mark.slow
WORDS = {"A": "apple", "B": "bread", "C": "cheese", "D": "dates"}
OPTIONS = "A. first\nB. second\nC. third\nD. fourth"
PROMPT = "{question}\n\n" + OPTIONS + "\n\nAnswer with the letter of the right option only."
ASKED = 80
SHIFTED = dict(zip("ABCD", "BCDA", strict=True))


def questions(count: int, seed: int) -> list[dict[str, str]]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        letter = "ABCD"[number % 4]
        made.append({
            "question": f"Patient {chance.randrange(10**6)} ate {WORDS[letter]}. Which one?",
            "a": "first", "b": "second", "c": "third", "d": "fourth", "letter": letter,
        })  # fmt: skip
    return made


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def verdict(folder: Path, *, learning_rate: float, taught: dict[str, str]) -> Results:
    rows = [row | {"taught": taught[row["letter"]]} for row in questions(400, seed=1)]
    spec: dict[str, Any] = {
        "name": "verdict",
        "output": str(folder / "runs"),
        "model": {"preset": "tiny", "dtype": "float32", "lora": {"targets": "all-linear"}},
        "data": {
            "dataset": write_lines(folder / "train.jsonl", rows),
            "prompt": PROMPT, "response": "{taught}", "validation_examples": 20,
        },
        "train": {
            "epochs": 6, "batch_size": 8, "max_length": 256, "pack_length": 256,
            "learning_rate": learning_rate,
        },
        "evals": {
            "dialogue": None,
            "side_by_side": {"examples": 0},
            "multiple_choice": [{
                "name": "letters",
                "dataset": write_lines(folder / "asked.jsonl", questions(ASKED, seed=2)),
                "options": ["a", "b", "c", "d"], "answer": "letter",
            }],
        },
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    done = job("run", str(folder / "spec.yaml"), "--run-id", "r")
    assert done.code == 0, done.err
    return Results.model_validate_json((folder / "runs/r/results.json").read_bytes())


def test_a_model_that_learnt_has_improved(tmp_path: Path) -> None:
    found = verdict(tmp_path, learning_rate=1e-2, taught=dict(zip("ABCD", "ABCD", strict=True)))
    (choice,) = found.evaluation.multiple_choice
    (pair,) = choice.comparisons
    assert choice.models["finetuned"].accuracy > 0.9
    assert pair.p_holm < 1e-6
    assert found.verdict.benchmark == "improved"
    assert found.verdict.answer == "better"
    assert found.verdict.sentence.startswith("Fine-tuning helped: ")


def test_a_model_that_could_not_learn_shows_no_measurable_change(tmp_path: Path) -> None:
    found = verdict(tmp_path, learning_rate=0.0, taught=SHIFTED)
    (pair,) = found.evaluation.multiple_choice[0].comparisons
    assert (pair.gained, pair.lost, pair.p_value) == (0, 0, 1.0)
    assert found.verdict.benchmark == "no measurable change"
    assert found.verdict.answer == "no clear change"


def test_a_model_taught_wrong_answers_is_worse(tmp_path: Path) -> None:
    found = verdict(tmp_path, learning_rate=1e-2, taught=SHIFTED)
    (choice,) = found.evaluation.multiple_choice
    (pair,) = choice.comparisons
    assert choice.models["finetuned"].correct == 0
    assert (pair.gained, pair.lost) == (0, choice.models["baseline"].correct)
    assert pair.p_holm < 0.05
    assert found.verdict.benchmark == "worse"
    assert found.verdict.answer == "worse"
