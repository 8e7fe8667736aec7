"""Frozen weights over several devices: less on each of them, and the same model."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from job.data.packing import make_rows
from job.errors import UsageError
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.sharding import loading_to_shards, shard_axis
from job.spec.schema import Train
from job.train.optimizer import make_optimizer
from job.train.step import StepConfig, make_train_step, padded_loss_count, shard_input
from tests.conftest import MakeModel
from tests.conversations import most_losses
from tests.train.small import (
    TWO_MATRICES,
    make_state,
    perturbed_lora,
    random_examples,
    small_model,
)


def mesh(data: int, model: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * model]).reshape(data, model), ("data", "model"))


@pytest.mark.parametrize(
    ("shape", "parts", "axis"),
    [
        ((262_144, 1152), 8, 0),
        ((1152, 6912), 8, 1),
        ((4, 1152, 256), 4, 0),
        ((4, 1152, 256), 8, 1),
        ((1, 1152, 256), 8, 1),
        ((16, 256, 3840), 8, 0),
        ((3840, 16, 256), 8, 1),
        ((1152,), 8, None),
        ((6, 9), 4, None),
        ((6, 9), 1, None),
    ],
)
def test_heads_are_split_if_they_divide_else_the_longest_axis(
    shape: tuple[int, ...], parts: int, axis: int | None
) -> None:
    assert shard_axis(shape, parts) == axis


def device_bytes(model: LanguageModel) -> list[int]:
    """Bytes of frozen weights on each device."""
    totals = dict.fromkeys(model.mesh.devices.flat, 0)
    for weight in model.weights:
        for shard in weight.addressable_shards:
            totals[shard.device] += shard.data.nbytes
    return list(totals.values())


def test_eight_devices_hold_at_most_a_seventh_each(make_model: MakeModel) -> None:
    replicated, split = make_model(), make_model(split=8)
    (everything,) = device_bytes(replicated)
    assert len(device_bytes(split)) == 8
    assert max(device_bytes(split)) <= everything / 7
    for ours, theirs in zip(split.weights, replicated.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_device_holds_all_of_a_split_weight_while_loading() -> None:
    import keras

    on = mesh(1, 8)
    with loading_to_shards(on):
        layer = keras.layers.Dense(1024, use_bias=False)
        layer.build((None, 512))
        started = layer.kernel.value
        before = {id(array) for array in jax.live_arrays()}
        layer.kernel.assign(np.ones((512, 1024)))
        made = [array for array in jax.live_arrays() if id(array) not in before]
    for array in (started, layer.kernel.value, *made):
        largest = max(math.prod(shard.data.shape) for shard in array.addressable_shards)
        assert largest == 512 * 1024 // 8
    assert layer.kernel.value.dtype == np.float32
    np.testing.assert_array_equal(layer.kernel.value, np.ones((512, 1024)))


def test_a_step_over_split_weights_equals_one_on_one_device() -> None:
    def step(mesh: tuple[int, int]) -> tuple[float, list[np.ndarray]]:
        model = small_model(lora=TWO_MATRICES, mesh=mesh, num_layers=1)
        rows = make_rows(random_examples(16), 14, packing=True)
        batch = rows.batch.take(np.arange(8) % len(rows.batch))
        lora = perturbed_lora(model)
        train = Train(optimizer="sgd", learning_rate=0.1, schedule="constant", warmup_ratio=0)
        optimizer, _ = make_optimizer(train, 1, lora)
        function = make_train_step(model, optimizer, StepConfig(ForwardConfig(packed=True)))
        losses = padded_loss_count(most_losses(batch, model.devices))
        inputs = shard_input(model, batch, 1, losses)
        state, metrics = function(make_state(model, optimizer, lora), model.weights, inputs)
        return float(metrics.loss), [np.asarray(a) for pair in state.lora for a in pair]

    (expected_loss, expected), (loss, arrays) = step((1, 1)), step((2, 4))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for ours, theirs in zip(arrays, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_merged_weights_stay_split(make_model: MakeModel) -> None:
    model = make_model(split=8)
    tuned = model.merged_weights(model.lora, perturbed_lora(model))
    for ours, frozen in zip(tuned, model.weights, strict=True):
        assert ours.sharding.is_equivalent_to(frozen.sharding, ours.ndim)


def test_a_kernel_that_cannot_be_split_is_named(make_model: MakeModel) -> None:
    with pytest.raises(UsageError, match=r"runtime.mesh.model: no axis of .*is divisible by 7"):
        make_model(split=7)
