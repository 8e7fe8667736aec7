"""Training here is training with transformers and PEFT: the same losses, gradients and weights.

With one query head the parameters of Keras' LoRA and PEFT's are the same, so that plain gradient
descent takes the same path: same checkpoint, same rows, same start, ten steps of each side's own.
"""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from job.adapters.hf_weight_map import target_matrices
from job.adapters.peft_format import peft_files, to_peft
from job.data.packing import TokenExample, make_rows
from job.model.language_model import ForwardConfig
from job.model.lora import LoraWeights
from job.model.tiny import VOCABULARY, train_tokenizer
from job.spec.schema import Lora, Model, Train
from job.train.optimizer import make_optimizer
from job.train.state import TrainState
from job.train.step import StepConfig, make_train_step, padded_loss_count, shard_input
from tests.conftest import MakeModel
from tests.conversations import most_losses, token_example
from tests.peers import run_peer

pytestmark = pytest.mark.slow
STEPS = 10
RATE = 0.1
LENGTHS = (30, 12, 21, 7)
"""Of the examples; the sliding window is 8."""


def examples() -> list[TokenExample]:
    generator = np.random.default_rng(4)
    return [
        token_example(str(n), generator.integers(10, VOCABULARY, size=n).tolist(), n // 3)
        for n in LENGTHS
    ]


@dataclass(frozen=True)
class Sides:
    """Losses of each step; gradient of the first and weights after the last, by PEFT's names."""

    our_losses: list[float]
    our_gradients: dict[str, np.ndarray]
    our_weights: dict[str, np.ndarray]
    their_losses: list[float]
    their_gradients: dict[str, np.ndarray]
    their_weights: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Sides:
    folder = tmp_path_factory.mktemp("parity")
    run_peer("make_models.py", folder, VOCABULARY, "gemma3_one_head")
    checkpoint = folder / "gemma3_one_head"
    (checkpoint / "tokenizer.model").write_bytes(train_tokenizer())
    model = make_model(preset=str(checkpoint), rank=4, alpha=6, targets=("query", "value", "key"))
    spec = Model(preset=str(checkpoint), dtype="float32", lora=Lora(rank=4, alpha=6))
    matrices = target_matrices(model.backbone, model.lora)

    def named(lora: LoraWeights) -> dict[str, np.ndarray]:
        """A and B by PEFT's names, transposed as PEFT has them."""
        found = {}
        for matrix, (a, b) in zip(matrices, jax.device_get(lora), strict=True):
            found[f"{matrix.module}.lora_A"] = a[0].T
            found[f"{matrix.module}.lora_B"] = b.T
        return found

    generator = np.random.default_rng(2)
    start: LoraWeights = tuple(
        (a, jnp.asarray(generator.normal(0, 0.1, b.shape), jnp.float32))
        for a, b in model.lora.init(0)
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    for name, content in peft_files(to_peft(model, spec, start, matrices)).items():
        (adapter / name).write_bytes(content)
    request = {
        "model": str(checkpoint), "adapter": str(adapter), "steps": STEPS, "rate": RATE,
        "rows": [e.token_ids for e in examples()],
        "prompt": [e.loss_mask.index(True) for e in examples()],
        "out": str(folder / "theirs.npz"),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    run_peer("train_steps.py", folder / "request.json")

    # Ours: the examples packed into rows, the way the job trains.
    rows = make_rows(examples(), 48, packing=True)
    train = Train(
        optimizer="sgd", learning_rate=RATE, schedule="constant", warmup_ratio=0, clip_norm=None
    )
    optimizer, _ = make_optimizer(train, STEPS, start)
    step = make_train_step(
        model, optimizer, StepConfig(ForwardConfig(packed=True, longest=max(LENGTHS)))
    )
    variables = tuple(model.replicate([v.value for v in optimizer.variables]))
    # The step donates the memory of its state.
    state = TrainState(jax.tree.map(jnp.array, model.replicate(start)), variables)
    batch = shard_input(model, rows.batch, 1, padded_loss_count(most_losses(rows.batch, 1)))
    losses, first = [], None
    for _ in range(STEPS):
        state, metrics = step(state, model.weights, batch)
        losses.append(float(metrics.loss / metrics.tokens))
        first = jax.device_get(state.lora) if first is None else first
    gradients = {
        name: (value - after) / RATE
        for (name, value), after in zip(named(start).items(), named(first).values(), strict=True)
    }
    with np.load(folder / "theirs.npz") as theirs:
        there = {
            name.replace("base_model.model.", "").replace(".default.weight", ""): theirs[name]
            for name in theirs.files
        }
    return Sides(
        losses,
        gradients,
        named(state.lora),
        there["losses"].tolist(),
        {name: there[f"gradient {name}"] for name in gradients},
        {name: there[f"value {name}"] for name in gradients},
    )


def test_ten_steps_have_the_same_losses(sides: Sides) -> None:
    np.testing.assert_allclose(sides.our_losses, sides.their_losses, atol=1e-4)
    assert sides.our_losses[-1] < sides.our_losses[0] - 0.01


def test_the_first_step_has_the_same_gradients(sides: Sides) -> None:
    for name, gradient in sides.their_gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-4, name
        np.testing.assert_allclose(sides.our_gradients[name], gradient, atol=1e-3 * scale)


def test_ten_steps_end_with_the_same_weights(sides: Sides) -> None:
    for name, weight in sides.their_weights.items():
        np.testing.assert_allclose(sides.our_weights[name], weight, atol=1e-4)
