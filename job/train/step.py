"""One optimizer step and one validation pass, each one compiled function.

A step takes its rows as `[accumulation, rows, ...]`: gradients of summed losses are added
over the first axis and divided by the number of loss tokens of the whole batch, so the
result does not depend on how the batch is cut up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from job.data.packing import Batch
from job.model.language_model import Forward, LanguageModel
from job.model.lora import LoraWeights, Weights, flatten, unflatten
from job.train.loss import LossSums, gather, head_loss, slice_length

Arrays = dict[str, jax.Array]
"""A batch by field name (see `Batch`)."""


class TrainState(NamedTuple):
    """What a step changes: the adapter and the optimizer's variables."""

    lora: LoraWeights
    optimizer: tuple[jax.Array, ...]


class StepFigures(NamedTuple):
    """Float32 scalars of one step; sums over its loss tokens."""

    loss: jax.Array
    correct: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def place(model: LanguageModel, batch: Batch, accumulation: int, losses: int) -> Arrays:
    """A batch on the devices.

    Args:
        accumulation: parts that go through the model one after the other.
        losses: width of a device's list of loss positions in each part.

    Returns:
        `token_ids` and `segments` `[accumulation, rows, length]`, rows split over the devices,
        and the lists of `Batch.flat_losses` `[accumulation, devices, losses]`, split likewise.
    """
    arrays = {
        name: getattr(batch, name).reshape(accumulation, -1, batch.token_ids.shape[1])
        for name in ("token_ids", "segments")
    }
    flat = batch.flat_losses(accumulation * model.devices, losses)
    arrays |= {name: array.reshape(accumulation, model.devices, -1) for name, array in flat.items()}
    placed: Arrays = model.split_batch(arrays, axis=1)
    return placed


def loss_width(most: int) -> int:
    """A width for lists of at most `most` loss positions; a multiple of 8 suits every device."""
    return max(8, -(-most // 8) * 8)


def _sums(
    model: LanguageModel, weights: Weights, lora: LoraWeights, rows: Arrays, settings: Forward
) -> LossSums:
    hidden = model.train_hidden(weights, lora, rows, settings)
    states = gather(hidden, rows["positions"])
    return head_loss(
        model.logits,
        weights,
        states,
        rows["targets"],
        rows["weights"],
        length=slice_length(1, states.shape[1], model.vocabulary),
        unroll=model.platform == "cpu",
    )


def make_train_step(
    model: LanguageModel, optimizer: Any, settings: Forward
) -> Callable[[TrainState, Weights, Arrays], tuple[TrainState, StepFigures]]:
    """The compiled step. A step whose loss or gradient is not finite changes nothing."""
    unroll = model.platform == "cpu"

    def loss(lora: LoraWeights, weights: Weights, rows: Arrays) -> tuple[jax.Array, LossSums]:
        sums = _sums(model, weights, lora, rows, settings)
        return sums.loss, sums

    def step(state: TrainState, weights: Weights, batch: Arrays) -> tuple[TrainState, StepFigures]:
        def accumulate(total: Any, rows: Arrays) -> tuple[Any, None]:
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(state.lora, weights, rows)
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, state.lora), LossSums(zero, zero))
        (gradients, sums), _ = jax.lax.scan(accumulate, start, batch, unroll=unroll)
        tokens = jnp.sum(batch["weights"])
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in flatten(gradients)))
        arrays, variables = optimizer.stateless_apply(
            list(state.optimizer), flatten(gradients), flatten(state.lora)
        )
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        changed = TrainState(unflatten(arrays), tuple(variables))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        return kept, StepFigures(sums.loss, sums.correct, tokens, norm)

    return jax.jit(step, donate_argnums=0)


def make_validation(
    model: LanguageModel, settings: Forward
) -> Callable[[LoraWeights, Weights, Arrays], LossSums]:
    """The compiled sums over one part `[1, ...]` for an adapter."""

    def sums(lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        rows = {name: array[0] for name, array in batch.items()}
        return _sums(model, weights, lora, rows, settings)

    return jax.jit(sums)
