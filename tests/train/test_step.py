"""The loss and its gradients are exact, however the batch is packed, divided or sharded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from job.data.packing import PackedRows, make_rows
from job.model.attention import CPU, Chunking
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import LoraWeights, flatten_lora
from job.spec.schema import Train
from job.train.loss import LossOptions, chunk_length, chunked_cross_entropy
from job.train.optimizer import WarmupSchedule, make_optimizer
from job.train.step import (
    StepConfig,
    StepMetrics,
    dropout_for,
    make_train_step,
    make_validation,
    padded_loss_count,
    shard_input,
)
from tests.conversations import most_losses
from tests.train.small import (
    TWO_MATRICES,
    make_state,
    perturbed_lora,
    random_examples,
    small_model,
)

Values = list[np.ndarray]
RunStep = Callable[[], tuple[Values, StepMetrics]]


def assert_close(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def projection() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A head `[50, 16]`, hidden states `[2, 24, 16]` and targets `[2, 24]`."""
    generator = np.random.default_rng(0)
    table = jnp.asarray(generator.normal(size=(50, 16)), jnp.float32)
    hidden = jnp.asarray(generator.normal(size=(2, 24, 16)), jnp.float32)
    return table, hidden, jnp.asarray(generator.integers(0, 50, size=(2, 24)))


def head(table: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ table.T


@pytest.mark.parametrize(("length", "unroll"), [(1, False), (3, True), (8, False), (24, True)])
def test_chunked_loss_equals_the_loss_over_all_logits(length: int, unroll: bool) -> None:
    table, hidden, targets = projection()
    weights = jnp.asarray(np.random.default_rng(1).integers(0, 2, size=(2, 24)), jnp.float32)
    options = LossOptions(length, unroll)

    def ours(states: jax.Array) -> jax.Array:
        return chunked_cross_entropy(head, table, states, targets, weights, options).loss

    def plain(states: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(states @ table.T)
        return -jnp.sum(weights * jnp.take_along_axis(logs, targets[..., None], 2)[..., 0])

    np.testing.assert_allclose(ours(hidden), plain(hidden), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(hidden), jax.grad(plain)(hidden), atol=1e-6)


def test_chunks_stay_within_the_memory_bound() -> None:
    for rows, losses, vocabulary in ((8, 256, 262_144), (1, 512, 2048), (64, 1024, 262_144)):
        length = chunk_length(rows, losses, vocabulary, np.float32)
        assert 1 <= length <= losses
        assert length == 1 or rows * length * vocabulary * 4 <= 2**30


@pytest.mark.parametrize("soft_cap", [False, True])
def test_a_correct_prediction_is_the_first_maximum(soft_cap: bool) -> None:
    """As with argmax; bfloat16 logits are often equal."""
    generator = np.random.default_rng(4)
    logits = jnp.asarray(generator.integers(0, 4, size=(1, 400, 8)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 8, size=(1, 400)))
    options = LossOptions(100, unroll=False, soft_cap=soft_cap)
    sums = chunked_cross_entropy(
        lambda _, states: states, None, logits, targets, jnp.ones((1, 400)), options
    )
    assert sums.correct == jnp.sum(jnp.argmax(logits, -1) == targets)
    assert 20 < sums.correct < 200


def loss_and_gradients(
    model: LanguageModel, rows: PackedRows, *, packed: bool
) -> tuple[float, list[jax.Array]]:
    """Summed loss and gradients by plain differentiation of the validation step."""
    function = make_validation(model, ForwardConfig(packed, longest=rows.longest))
    batch = shard_input(model, rows.batch, 1, padded_loss_count(most_losses(rows.batch, 1)))

    def loss(lora: LoraWeights) -> jax.Array:
        return function(lora, model.weights, batch).loss

    value, gradients = jax.value_and_grad(loss)(perturbed_lora(model))
    return float(value), flatten_lora(gradients)


def test_packed_loss_and_gradients_equal_unpacked_ones(
    monkeypatch: pytest.MonkeyPatch, small: LanguageModel
) -> None:
    examples = random_examples(count=8, longest=60)
    unpacked = make_rows(examples, 64, packing=False)
    expected_loss, expected = loss_and_gradients(small, unpacked, packed=False)
    scale = max(float(jnp.abs(gradient).max()) for gradient in expected)
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in expected)
    packed = make_rows(examples, 128, packing=True)
    assert len(packed.batch) < len(unpacked.batch)
    for chunking in (CPU, Chunking(128, 2.0)):
        monkeypatch.setattr(small, "chunking", chunking)
        loss, gradients = loss_and_gradients(small, packed, packed=True)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_close(gradients, expected, atol=1e-5 * scale)


def step_of(model: LanguageModel, micro_batches: int = 1, **config: Any) -> RunStep:
    """A compiled step of plain gradient descent, and its first batch."""
    rows = make_rows(random_examples(count=8), 14, packing=False)
    lora = perturbed_lora(model)
    train = Train(optimizer="sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0)
    optimizer, _ = make_optimizer(train, 1, lora)
    forward = ForwardConfig(packed=True, remat=config.pop("remat", "matmuls"))
    step = make_train_step(model, optimizer, StepConfig(forward, **config))
    losses = padded_loss_count(most_losses(rows.batch, micro_batches * model.devices))
    batch = shard_input(model, rows.batch, micro_batches, losses)

    def run() -> tuple[Values, StepMetrics]:
        state, metrics = step(make_state(model, optimizer, lora), model.weights, batch)
        return [np.asarray(a) for a in flatten_lora(state.lora)], jax.device_get(metrics)

    return run


@cache
def _usual(model: LanguageModel) -> tuple[Values, StepMetrics]:
    return step_of(model)()


@pytest.fixture
def usual(small: LanguageModel) -> tuple[Values, StepMetrics]:
    """The result of one step with the defaults."""
    return _usual(small)


@pytest.fixture
def before(small: LanguageModel) -> Values:
    """The LoRA weights before the step."""
    return [np.asarray(a) for a in flatten_lora(perturbed_lora(small))]


def test_an_accumulated_step_equals_that_of_the_full_batch(
    small: LanguageModel, usual: tuple[Values, StepMetrics]
) -> None:
    assert_close(step_of(small, 4)(), usual)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_rematerialization_does_not_change_the_step(
    small: LanguageModel, usual: tuple[Values, StepMetrics], remat: str
) -> None:
    assert_close(step_of(small, remat=remat)(), usual)


def test_a_step_on_eight_devices_equals_that_on_one(usual: tuple[Values, StepMetrics]) -> None:
    assert_close(step_of(small_model(lora=TWO_MATRICES, mesh=(8, 1)))(), usual)


def test_the_gradient_is_clipped_to_the_global_norm(
    before: Values, usual: tuple[Values, StepMetrics]
) -> None:
    after, metrics = usual
    distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(after, before, strict=True)))
    # The learning rate is 1 and the norm is clipped to 1 by default.
    assert distance == pytest.approx(min(1.0, float(metrics.gradient_norm)), rel=1e-4)


def test_dropout_follows_from_the_seed_and_changes_the_step(
    small: LanguageModel, usual: tuple[Values, StepMetrics]
) -> None:
    run = step_of(small, dropout=0.5)
    (dropped, _), (again, _) = run(), run()
    np.testing.assert_array_equal(dropped[0], again[0])
    assert not np.allclose(dropped[0], usual[0][0], atol=1e-5)
    forward = ForwardConfig(packed=True)
    keys = {
        tuple(jax.random.key_data(dropout_for(StepConfig(forward, 0.5, seed), number).key).tolist())
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        ("constant", 0, 0.25),
        ("constant", 3, 1.0),
        ("constant", 9, 1.0),
        ("linear", 4, 1.0),
        ("linear", 9, 0.5),
        ("linear", 14, 0.0),
        ("cosine", 4, 1.0),
        ("cosine", 9, 0.5),
        ("cosine", 14, 0.0),
    ],
)
def test_the_learning_rate_follows_the_schedule(shape: str, step: int, expected: float) -> None:
    schedule = WarmupSchedule(1.0, shape, warmup=4, steps=14)
    assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)
