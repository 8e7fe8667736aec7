"""An adapter trained here is the same model in transformers and PEFT, for each family.

A tiny random checkpoint is made by transformers, loaded and trained by this job, exported, and
read back by transformers and PEFT, which must give the logits of the tuned model. Prompts are
shorter and longer than the sliding window of 8.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from job.adapters.hf_weight_map import target_matrices
from job.adapters.keras_format import load_adapter, save_adapter
from job.adapters.merge import merge_checkpoint
from job.adapters.peft_format import peft_files, read_peft, to_peft, uniform_rank
from job.chat.tokenizer import ChatTokenizer
from job.data.packing import make_rows
from job.model.language_model import ForwardConfig, LanguageModel, Preset
from job.model.load import load_task
from job.model.lora import Weights, unflatten_lora
from job.model.tiny import VOCABULARY
from job.spec.schema import Lora, Model, Train
from job.train.optimizer import make_optimizer
from job.train.state import TrainState
from job.train.step import StepConfig, make_train_step, padded_loss_count, shard_input
from tests.conversations import most_losses, token_example
from tests.model.forward import full_logits
from tests.peers import run_peer

pytestmark = pytest.mark.slow
FAMILIES = ("gemma3", "gemma", "gemma2", "llama3", "mistral", "qwen2", "qwen3", "gemma4")
LENGTHS = (1, 7, 8, 9, 17, 40)
WITHIN = 1e-4


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(10, VOCABULARY, size=length).tolist() for length in LENGTHS]


def logits(model: LanguageModel, weights: Weights) -> list[np.ndarray]:
    """Float32 `[length, vocabulary]` of each prompt."""
    longest = max(LENGTHS)
    tokens = np.array([[*row, *[0] * (longest - len(row))] for row in prompts()], np.int32)
    mask = np.array([[1] * n + [0] * (longest - n) for n in LENGTHS], np.int32)

    rows = full_logits(model, weights, tokens, mask)
    return [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


def load_model(folder: Path, tokenizer: ChatTokenizer) -> LanguageModel:
    """The model of a transformers folder without a tokenizer, all linear layers adapted."""
    task = load_task(str(folder), "float32", folder.name)
    spec = Model(preset=str(folder), dtype="float32", lora=LORA)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    return LanguageModel(task, tokenizer, spec, Preset(str(folder), None), mesh)


LORA = Lora(rank=4, alpha=6, targets="all-linear")


def train(model: LanguageModel) -> TrainState:
    """Three steps of the job's own, far enough to change the model."""
    generator = np.random.default_rng(3)
    examples = [
        token_example(str(n), generator.integers(10, VOCABULARY, size=24).tolist(), 8)
        for n in range(4)
    ]
    rows = make_rows(examples, 24, packing=False)
    start = model.lora.init(0)
    optimizer, _ = make_optimizer(
        Train(optimizer="sgd", learning_rate=0.5, schedule="constant"), 3, start
    )
    step = make_train_step(model, optimizer, StepConfig(ForwardConfig(packed=False, remat="none")))
    variables = tuple(model.replicate([v.value for v in optimizer.variables]))
    state = TrainState(model.replicate(start), variables)
    batch = shard_input(model, rows.batch, 1, padded_loss_count(most_losses(rows.batch, 1)))
    # Compiled in a hurry: three steps need no fast code.
    quick = step.lower(state, model.weights, batch).compile({"xla_backend_optimization_level": 0})
    for _ in range(3):
        state, figures = quick(state, model.weights, batch)
        assert np.isfinite(figures.loss)
    return state


@dataclass(frozen=True)
class Exchange:
    """What this job computed, and where the other side's answers are."""

    folder: Path
    base: dict[str, list[np.ndarray]]
    tuned: dict[str, list[np.ndarray]]

    def answer(self, name: str) -> list[np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as arrays:
            return [arrays[str(number)] for number in range(len(LENGTHS))]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory, tiny: LanguageModel) -> Exchange:
    folder = tmp_path_factory.mktemp("families")
    run_peer("make_models.py", folder, VOCABULARY, *FAMILIES)
    base, tuned, requests = {}, {}, []

    def ask(name: str, model: Path, adapter: Path | None = None, *, merge: bool = False) -> None:
        requests.append({
            "model": str(model), "adapter": adapter and str(adapter), "merge": merge,
            "prompts": prompts(), "out": str(folder / f"{name}.npz"),
        })  # fmt: skip

    for family in FAMILIES:
        model = load_model(folder / family, tiny.tokenizer)
        base[family] = logits(model, model.weights)
        path = folder / f"{family}.lora.h5"
        save_adapter(path, model.lora, train(model).lora)
        layout, lora = load_adapter(path, model.lora)
        tuned[family] = logits(model, model.merged_weights(layout, lora))
        # From the file, whose alpha is its rank.
        unscaled = unflatten_lora([x / model.lora.scale if n % 2 else x for n, x in enumerate(
            array for pair in lora for array in pair)])  # fmt: skip
        spec = Model(preset=str(folder / family), dtype="float32", lora=LORA)
        adapter = to_peft(model, spec, unscaled, target_matrices(model.backbone, model.lora))
        peft = write(folder / f"{family}-peft", peft_files(adapter))
        merged = folder / f"{family}-merged"
        merged.mkdir()
        merge_checkpoint(folder / family, read_peft(peft), merged)
        ask(f"{family}-base", folder / family)
        ask(f"{family}-adapter", folder / family, peft)
        ask(f"{family}-unloaded", folder / family, peft, merge=True)
        ask(f"{family}-merged", merged)
        if family == "gemma3":
            one = write(folder / "uniform", peft_files(uniform_rank(read_peft(peft))))
            ask("gemma3-uniform", folder / family, one)
    (folder / "requests.json").write_text(json.dumps(requests))
    run_peer("logits.py", folder / "requests.json")
    return Exchange(folder, base, tuned)


@pytest.mark.parametrize("way", ["adapter", "unloaded", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_tuned_logits(exchange: Exchange, family: str, way: str) -> None:
    ours, before = exchange.tuned[family], exchange.base[family]
    for mine, theirs, base, other in zip(
        ours, exchange.answer(f"{family}-{way}"), before, exchange.answer(f"{family}-base"),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(base, other, atol=WITHIN)
        np.testing.assert_allclose(mine, theirs, atol=WITHIN)
        assert np.abs(mine - base).max() > 0.1


def test_one_rank_for_all_layers_is_the_same_adapter(exchange: Exchange) -> None:
    config = json.loads((exchange.folder / "uniform/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 24, {})
    for mine, theirs in zip(
        exchange.tuned["gemma3"], exchange.answer("gemma3-uniform"), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=WITHIN)
