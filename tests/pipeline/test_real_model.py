"""Real weights are the same model here and in transformers, before and after tuning.

One run tunes the model on a few dialogues. Its losses, its adapter, and what is exported from it
must be what transformers and PEFT compute from the same files in float32.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from job.adapters.keras_format import load_adapter
from job.chat.tokenizer import OptionTokens
from job.data.examples import Example
from job.data.packing import tokenize
from job.data.split_files import iter_examples
from job.evals.engine import Engine
from job.evals.tasks import letter_context, load_task, question_prompts
from job.model.language_model import LanguageModel
from job.model.load import load_model
from job.spec.schema import Lora, Model, MultipleChoiceEval
from tests import real_models
from tests.command import job
from tests.model.forward import full_logits
from tests.peers import run_peer

pytestmark = pytest.mark.real
LARGER = pytest.mark.skipif("REAL_MODEL" not in os.environ, reason="half an hour; REAL_MODEL=1")
MODELS = ("smollm2", pytest.param("gemma3_270m", marks=LARGER))
QUESTIONS = {
    "name": "questions", "dataset": os.environ.get("MEDMCQA_FILE", "samples"), "answer": "cop",
    "options": ["opa", "opb", "opc", "opd"], "limit": 200 if "MEDMCQA_FILE" in os.environ else 64,
}  # fmt: skip
"""The shipped questions, or 200 of a file in MedMCQA's columns."""

LORA = {"rank": 8, "alpha": 16, "targets": ["query", "value"]}
LENGTHS = (
    1,
    2,
    7,
    30,
    31,
    64,
    100,
    128,
    129,
    200,
    255,
    256,
    300,
    400,
    500,
    511,
    513,
    600,
    650,
    700,
)
EVERY, NEW_TOKENS, WITHIN = 29, 64, 1e-3


@dataclass(frozen=True)
class Comparison:
    """A tuned model, and what transformers computes from the files of its run."""

    model: LanguageModel
    tuned: Any
    prompts: list[list[int]]
    chats: list[list[int]]
    questions: list[list[int]]
    letters: OptionTokens
    losses: dict[str, float]
    theirs: dict[str, np.ndarray]


def spec_of(folder: Path, runs: Path) -> dict[str, Any]:
    return {
        "name": "t",
        "output": str(runs),
        "model": {"preset": str(folder), "dtype": "float32", "lora": LORA},
        "data": {
            "dataset": "samples", "system": "{instruction}", "prompt": "{input}",
            "response": "{output}", "train_examples": 32, "validation_examples": 8,
        },
        "train": {"batch_size": 4, "max_length": 320, "pack_length": 512, "learning_rate": 1e-3},
        "evals": {"dialogue": None, "side_by_side": {"examples": 0}},
    }  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def comparison(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Comparison:
    work = tmp_path_factory.mktemp("real")
    folder = in_float32(getattr(real_models, request.param)(), work / request.param)
    (work / "spec.yaml").write_text(yaml.safe_dump(spec_of(folder, work)))

    def succeed(*arguments: str) -> None:
        done = job(*arguments)
        assert done.code == 0, done.err

    succeed("run", str(work / "spec.yaml"), "--run-id", "run", "--until", "train")
    run = work / "run"
    for to in ("merged-transformers", "merged-keras"):
        succeed("export", str(run), str(work / to), "--to", to)
    section = Model(preset=str(folder), dtype="float32", lora=Lora.model_validate(LORA))
    model = on_one_device(section)
    adapter = load_adapter(run / "adapter/adapter.lora.h5", model.lora)
    examples = list(iter_examples(run / "data/validation.parquet"))
    held_out = tokenize(examples, model.tokenizer, 320, "response").examples
    prompts, chats = (
        texts_of(model, examples),
        chats_of(model, list(iter_examples(run / "data/train.parquet"))),
    )
    task = load_task(MultipleChoiceEval.model_validate(QUESTIONS))
    questions = model.tokenizer.encode_prompts(question_prompts(task))
    letters = model.tokenizer.letter_tokens("ABCD", *letter_context(task.entry))
    base = {
        "questions": [], "letters": letters.ids,
        "prompts": prompts, "every": EVERY, "chats": [], "new_tokens": NEW_TOKENS, "adapter": None,
        "stop_ids": list(model.tokenizer.stop_ids), "rows": [
            {"token_ids": e.token_ids, "loss_mask": e.loss_mask} for e in held_out],
    }  # fmt: skip
    requests = [
        {
            **base,
            "name": "base",
            "model": str(folder),
            "chats": chats,
            "questions": [[*question, *letters.prefix] for question in questions],
        },
        {**base, "name": "peft", "model": str(folder), "adapter": str(run / "adapter/peft")},
        {**base, "name": "merged", "model": str(work / "merged-transformers")},
    ]
    (work / "request.json").write_text(json.dumps(requests))
    run_peer("real_model.py", work / "request.json", work / "out.npz", seconds=1200)
    record = json.loads((run / "stages/train.json").read_text())
    with np.load(work / "out.npz") as arrays:
        theirs = dict(arrays)
    weights = {"peft": model.merged_weights(*adapter)}
    keras = on_one_device(section.model_copy(update={"preset": str(work / "merged-keras")}))
    weights["merged-keras"] = keras.weights
    losses = dict(record["outcome"]["training"]["loss"])
    return Comparison(model, weights, prompts, chats, questions, letters, losses, theirs)


def in_float32(folder: Path, target: Path) -> Path:
    """Copy a checkpoint, so that merging into its weights does not round them to bfloat16."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    weights = {name: weight.astype(np.float32) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return target


def on_one_device(section: Model) -> LanguageModel:
    return load_model(
        section, 0, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    )


def texts_of(model: LanguageModel, examples: list[Example]) -> list[list[int]]:
    """Prompts of given lengths, cut from all held-out dialogues one after the other."""
    tokens = [
        t
        for e in examples
        for t in tokenize([e], model.tokenizer, 4096, "all").examples[0].token_ids
    ]
    while len(tokens) < max(LENGTHS):
        tokens += tokens
    return [tokens[:length] for length in LENGTHS]


def chats_of(model: LanguageModel, examples: list[Example]) -> list[list[int]]:
    """Prompts of twenty chats."""
    return model.tokenizer.encode_prompts([example.prompt_messages for example in examples[:20]])


def logits(model: LanguageModel, weights: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """Float32 `[positions, vocabulary]` of each prompt, at each position that EVERY divides."""
    longest = max(map(len, prompts))
    found = []
    for prompt in prompts:
        padding = [0] * (longest - len(prompt))
        tokens = np.array([[*prompt, *padding]], np.int32)
        mask = np.array([[1] * len(prompt) + padding], np.int32)
        found.append(full_logits(model, weights, tokens, mask)[0][: len(prompt)][::EVERY])
    return found


def largest_difference(comparison: Comparison, weights: Any, name: str) -> float:
    mine = logits(comparison.model, weights, comparison.prompts)
    theirs = [comparison.theirs[f"{name} logits {n}"] for n in range(len(mine))]
    return max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))


def test_logits_are_those_of_transformers(comparison: Comparison) -> None:
    difference = largest_difference(comparison, comparison.model.weights, "base")
    print(f"largest difference of logits: {difference:.2e}")  # noqa: T201
    assert difference < WITHIN


def test_greedy_answers_are_those_of_transformers(comparison: Comparison) -> None:
    model = comparison.model
    engine = Engine(model, 10, 2048)
    rows = engine.generate(model.weights, comparison.chats, NEW_TOKENS, "chats")
    for number, answer in enumerate(map(engine.reply, rows, comparison.chats)):
        tokens = comparison.theirs[f"base answer {number}"].tolist()
        end = next((i for i, t in enumerate(tokens) if t in model.tokenizer.stop_ids), None)
        assert answer.answer == model.tokenizer.decode(tokens[:end]).strip()
        assert answer.finish == ("length" if end is None else "stop")


def test_chosen_letters_are_those_of_transformers(comparison: Comparison) -> None:
    model, theirs = comparison.model, comparison.theirs["base letters"]
    engine = Engine(model, 10, 2048)
    scores = engine.loglikelihood(
        model.weights, comparison.questions, comparison.letters, "letters"
    )
    assert (scores.argmax(axis=1) == theirs.argmax(axis=1)).all()
    assert scores - scores[:, :1] == pytest.approx(theirs - theirs[:, :1], abs=WITHIN)


def test_validation_losses_are_those_of_transformers(comparison: Comparison) -> None:
    losses, theirs = comparison.losses, comparison.theirs
    assert losses["validation_before"] == pytest.approx(float(theirs["base loss"]), abs=1e-5)
    assert losses["validation_after"] == pytest.approx(float(theirs["peft loss"]), abs=1e-5)
    assert losses["validation_after"] < losses["validation_before"] - 0.02


@pytest.mark.parametrize("name", ["peft", "merged"])
def test_the_tuned_model_is_the_same_elsewhere(comparison: Comparison, name: str) -> None:
    assert largest_difference(comparison, comparison.tuned["peft"], name) < WITHIN


def test_the_merged_keras_preset_is_the_tuned_model(comparison: Comparison) -> None:
    assert largest_difference(comparison, comparison.tuned["merged-keras"], "peft") < WITHIN
