"""The loss and its gradients are exact, however the batch is packed, cut up or spread out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from job.data.packing import PackedRows, TokenExample, make_rows
from job.model.attention import CPU, Chunking
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import LoraWeights, flatten_lora
from job.model.remat import Remat
from job.spec.schema import Train
from job.train.blockwise_step import make_step
from job.train.loss import head_loss, slice_length
from job.train.optimizer import WarmupSchedule, make_optimizer
from job.train.step import StepConfig, TrainState, make_validation, padded_loss_count, shard_input
from tests.conversations import token_example


def examples(count: int = 8, longest: int = 90) -> list[TokenExample]:
    """Random examples of many lengths, some longer than the sliding window of 64."""
    generator = np.random.default_rng(5)
    made = []
    for number in range(count):
        length = longest if number == 0 else int(generator.integers(6, longest))
        tokens = generator.integers(10, 2000, size=length).tolist()
        made.append(token_example(str(number), tokens, int(generator.integers(1, length - 1))))
    return made


def trained_start(model: LanguageModel) -> LoraWeights:
    """An adapter that already changes the model, so that every gradient is non-zero."""
    generator = np.random.default_rng(2)
    return tuple(
        (a, jnp.asarray(generator.normal(0, 0.05, b.shape), jnp.float32))
        for a, b in model.lora.init(0)
    )


def sums_and_gradients(model: LanguageModel, rows: PackedRows, *, packed: bool) -> tuple:
    """Summed loss and gradients by plain differentiation of the validation function."""
    function = make_validation(model, ForwardConfig(packed, longest=rows.longest))
    batch = shard_input(model, rows.batch, 1, padded_loss_count(int(rows.batch.losses(1).max())))

    def loss(lora: LoraWeights) -> jax.Array:
        return function(lora, model.weights, batch).loss

    value, gradients = jax.value_and_grad(loss)(trained_start(model))
    return float(value), flatten_lora(gradients)


@pytest.mark.parametrize("length", [1, 3, 8, 24])
@pytest.mark.parametrize("unroll", [True, False])
def test_sliced_loss_equals_the_loss_over_all_logits(length: int, unroll: bool) -> None:
    generator = np.random.default_rng(0)
    table = jnp.asarray(generator.normal(size=(50, 16)), jnp.float32)
    hidden = jnp.asarray(generator.normal(size=(2, 24, 16)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 50, size=(2, 24)))
    weights = jnp.asarray(generator.integers(0, 2, size=(2, 24)), jnp.float32)

    def ours(states: jax.Array) -> jax.Array:
        return head_loss(
            lambda table, h: h @ table.T,
            table,
            states,
            targets,
            weights,
            length=length,
            unroll=unroll,
        ).loss

    def plain(states: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(states @ table.T)
        return -jnp.sum(weights * jnp.take_along_axis(logs, targets[..., None], 2)[..., 0])

    np.testing.assert_allclose(ours(hidden), plain(hidden), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(hidden), jax.grad(plain)(hidden), atol=1e-6)


def test_slices_stay_within_the_memory_bound() -> None:
    for rows, losses, vocabulary in ((8, 256, 262_144), (1, 512, 2048), (64, 1024, 262_144)):
        length = slice_length(rows, losses, vocabulary, np.float32)
        assert 1 <= length <= losses
        assert length == 1 or rows * length * vocabulary * 4 <= 2**30


@pytest.mark.parametrize("capped", [False, True])
def test_a_prediction_is_right_where_argmax_says_so(capped: bool) -> None:
    """Of equal logits the first counts, as bfloat16 has many."""
    generator = np.random.default_rng(4)
    logits = jnp.asarray(generator.integers(0, 4, size=(1, 400, 8)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 8, size=(1, 400)))
    found = head_loss(
        lambda _, states: states, None, logits, targets, jnp.ones((1, 400)),
        length=100, unroll=False, capped=capped,
    )  # fmt: skip
    assert found.correct == jnp.sum(jnp.argmax(logits, -1) == targets)
    assert 20 < found.correct < 200


@pytest.mark.parametrize("cut", [CPU, Chunking(16, 1.0), Chunking(128, 2.0)])
def test_packed_loss_and_gradients_equal_unpacked_ones(
    monkeypatch: pytest.MonkeyPatch, tiny: LanguageModel, cut: Chunking
) -> None:
    monkeypatch.setattr(tiny, "chunking", cut)
    made = examples()
    packed = make_rows(made, 256, packing=True)
    apart = make_rows(made, 128, packing=False)
    assert len(packed.batch) < len(apart.batch)
    loss_packed, gradients_packed = sums_and_gradients(tiny, packed, packed=True)
    loss_apart, gradients_apart = sums_and_gradients(tiny, apart, packed=False)
    assert loss_packed == pytest.approx(loss_apart, rel=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in gradients_apart)
    for ours, theirs in zip(gradients_packed, gradients_apart, strict=True):
        assert float(jnp.abs(theirs).max()) > 0
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)


def step_once(
    model: LanguageModel, accumulation: int, remat: Remat = "matmuls", **recipe: float
) -> tuple:
    rows = make_rows(examples(), 128, packing=False)
    start = trained_start(model)
    train = Train(optimizer="sgd", learning_rate=1.0, schedule="constant", warmup_ratio=0)
    optimizer, _ = make_optimizer(train, 1, start)
    state = TrainState(
        *model.replicate(
            jax.tree.map(np.array, (start, tuple(v.value for v in optimizer.variables)))
        )
    )
    # By blocks, which is quicker to compile; tests of the chain compare it with the one program.
    what = StepConfig(ForwardConfig(packed=True, remat=remat), **recipe)
    step, _ = make_step(model, optimizer, what, "blocks")
    width = padded_loss_count(int(rows.batch.losses(accumulation * model.devices).max()))
    state, figures = step(state, model.weights, shard_input(model, rows.batch, accumulation, width))
    return [np.asarray(a) for a in flatten_lora(state.lora)], jax.device_get(figures)


def test_accumulated_step_equals_the_step_of_the_whole_batch(tiny: LanguageModel) -> None:
    whole, figures = step_once(tiny, 1)
    parts, same = step_once(tiny, 4)
    np.testing.assert_allclose(figures, same, rtol=1e-5)
    for ours, theirs in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_what_is_kept_for_the_backward_pass_changes_no_figure(
    tiny: LanguageModel, remat: Remat
) -> None:
    usual, figures = step_once(tiny, 1)
    other, same = step_once(tiny, 1, remat)
    np.testing.assert_allclose(figures, same, rtol=1e-5)
    for ours, theirs in zip(other, usual, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_step_on_eight_devices_equals_the_step_on_one(make_model, tiny: LanguageModel) -> None:
    one, figures = step_once(tiny, 1)
    eight, same = step_once(make_model(devices=8), 1)
    np.testing.assert_allclose(figures, same, rtol=1e-5)
    for ours, theirs in zip(eight, one, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gradient_is_clipped_to_the_global_norm(tiny: LanguageModel) -> None:
    start = [np.asarray(a) for a in flatten_lora(trained_start(tiny))]
    moved, figures = step_once(tiny, 1)
    distance = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(moved, start, strict=True)))
    # The rate is 1 and the norm is clipped to 1 by default: that is how far a step goes.
    assert distance == pytest.approx(min(1.0, float(figures.gradient_norm)), rel=1e-4)


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
def test_learning_rate_rises_and_falls_as_the_spec_says(
    shape: str, step: int, expected: float
) -> None:
    schedule = WarmupSchedule(1.0, shape, warmup=4, steps=14)
    assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_spreads_the_target_over_the_vocabulary() -> None:
    generator = np.random.default_rng(0)
    table = jnp.asarray(generator.normal(size=(50, 16)), jnp.float32)
    hidden = jnp.asarray(generator.normal(size=(2, 24, 16)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 50, size=(2, 24)))
    smoothed = 0.9 * jax.nn.one_hot(targets, 50) + 0.1 / 50
    expected = -jnp.sum(smoothed * jax.nn.log_softmax(hidden @ table.T))
    found = head_loss(
        lambda table, h: h @ table.T, table, hidden, targets, jnp.ones((2, 24)),
        length=7, unroll=True, smoothing=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_lora_plus_takes_larger_steps_with_b_only(tiny: LanguageModel) -> None:
    start = [np.asarray(a) for a in flatten_lora(trained_start(tiny))]
    usual, _ = step_once(tiny, 1)
    faster, _ = step_once(tiny, 1, lora_plus_ratio=4.0)
    for number, (old, one, four) in enumerate(zip(start, usual, faster, strict=True)):
        factor = 4.0 if number % 2 else 1.0
        np.testing.assert_allclose(four - old, factor * (one - old), atol=1e-5)


def test_dropout_follows_from_the_seed_and_changes_the_step(tiny: LanguageModel) -> None:
    usual, _ = step_once(tiny, 1)
    dropped, _ = step_once(tiny, 1, dropout=0.5)
    again, _ = step_once(tiny, 1, dropout=0.5)
    other, _ = step_once(tiny, 1, dropout=0.5, seed=1)
    np.testing.assert_array_equal(dropped[0], again[0])
    assert not np.allclose(dropped[0], usual[0], atol=1e-5)
    assert not np.allclose(dropped[0], other[0], atol=1e-5)
