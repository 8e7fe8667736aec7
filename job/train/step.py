"""How a training step works: one compiled function from a state and a batch to the next state.

A step takes its rows as `[gradient_accumulation_steps, rows, ...]`, one micro-batch after another.
The gradients of summed losses are added up and divided by the number of loss tokens of the full
batch, so the result does not depend on how the batch is divided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from job.data.packing import Batch
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import Dropout, LoraWeights, Weights, flatten_lora, unflatten_lora
from job.train.loss import (
    LossOptions,
    LossSums,
    chunk_length,
    chunked_cross_entropy,
)
from job.train.state import TrainState

Arrays = dict[str, jax.Array]
"""The arrays of a batch by name (see `shard_input`)."""


class StepMetrics(NamedTuple):
    """Metrics of one step; `loss`, `correct` and `tokens` are sums over its loss tokens."""

    loss: jax.Array
    correct: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    """Norm of the mean gradient, before clipping."""
    stop: jax.Array
    """Above 0 if a process has been told to stop."""


class StepConfig(NamedTuple):
    """Everything about a training step except the optimizer."""

    forward: ForwardConfig
    dropout: float = 0.0
    seed: int = 0


TrainStep = Callable[[TrainState, Weights, Arrays], tuple[TrainState, StepMetrics]]
ValidationStep = Callable[[LoraWeights, Weights, Arrays], LossSums]


def shard_input(
    model: LanguageModel,
    batch: Batch,
    gradient_accumulation_steps: int,
    losses: int,
    step: int = 0,
    *,
    stop: bool = False,
) -> Arrays:
    """Put a batch on the devices, divided into micro-batches.

    Args:
        model: the model, which has the mesh.
        batch: the rows of the step.
        gradient_accumulation_steps: number of micro-batches.
        losses: length that each device's list of loss positions is padded to, per micro-batch.
        step: number of the step, which determines the dropout of its micro-batches.
        stop: whether this process has been told to stop; the metrics tell all processes.

    Returns:
        `token_ids` and `segment_ids` `[gradient_accumulation_steps, rows, length]`, rows sharded
        over the devices; `positions`, `targets` and `weights` (see `Batch.group_loss_positions`)
        `[gradient_accumulation_steps, devices, losses]`, sharded likewise; `micro_batch`
        `[gradient_accumulation_steps]`, the global number of each micro-batch, replicated; and
        `stop` `[data, model]`.
    """
    count = gradient_accumulation_steps
    arrays = {
        name: getattr(batch, name).reshape(count, -1, batch.token_ids.shape[1])
        for name in ("token_ids", "segment_ids")
    }
    flat = batch.group_loss_positions(count * model.devices, losses)
    arrays |= {name: array.reshape(count, model.devices, -1) for name, array in flat.items()}
    numbers = np.arange(count, dtype=np.int32) + step * count
    sharded: Arrays = model.shard_batch(arrays, axis=1)
    return sharded | {"micro_batch": model.replicate(numbers), "stop": model.process_local(stop)}


def padded_loss_count(losses: int) -> int:
    """Round the length of a list of loss positions up to a multiple of 8, at least 8."""
    return max(8, -(-losses // 8) * 8)


def dropout_for(config: StepConfig, micro_batch: jax.Array) -> Dropout:
    """Return the dropout of a micro-batch by its global number."""
    return Dropout(config.dropout, jax.random.fold_in(jax.random.key(config.seed), micro_batch))


def head_loss(model: LanguageModel, weights: Weights, hidden: jax.Array, rows: Arrays) -> LossSums:
    """Compute the loss of a micro-batch from its hidden states `[devices, losses, hidden]`."""
    options = LossOptions(
        chunk_length=chunk_length(1, hidden.shape[1], model.vocabulary, hidden.dtype),
        unroll=model.platform == "cpu",
        soft_cap=bool(getattr(model.backbone.token_embedding, "logit_soft_cap", None)),
    )
    return chunked_cross_entropy(
        model.logits, weights, hidden, rows["targets"], rows["weights"], options
    )


def loss_sums(
    model: LanguageModel, weights: Weights, lora: LoraWeights, rows: Arrays, config: StepConfig
) -> LossSums:
    """Compute the loss of one micro-batch; traceable, differentiable by `lora`."""
    dropout = dropout_for(config, rows["micro_batch"]) if config.dropout else None
    hidden = model.hidden_states(weights, rows, config.forward, lora, dropout)
    return head_loss(model, weights, hidden, rows)


def make_train_step(model: LanguageModel, optimizer: Any, config: StepConfig) -> TrainStep:
    """Return the compiled step. A step whose loss or gradient is not finite changes nothing."""
    unroll = model.platform == "cpu"

    def loss(lora: LoraWeights, weights: Weights, rows: Arrays) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(model, weights, lora, rows, config)
        return sums.loss, sums

    def step(state: TrainState, weights: Weights, batch: Arrays) -> tuple[TrainState, StepMetrics]:
        def accumulate(total: Any, rows: Arrays) -> tuple[Any, None]:
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(state.lora, weights, rows)
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        zero = jnp.zeros((), jnp.float32)
        zeros = (jax.tree.map(jnp.zeros_like, state.lora), LossSums(zero, zero))
        rows = {name: array for name, array in batch.items() if name != "stop"}
        total, _ = jax.lax.scan(accumulate, zeros, rows, unroll=unroll)
        return apply_gradients(optimizer, state, *total, batch)

    return jax.jit(step, donate_argnums=0, out_shardings=model.replicated)


def apply_gradients(
    optimizer: Any, state: TrainState, gradients: LoraWeights, sums: LossSums, batch: Arrays
) -> tuple[TrainState, StepMetrics]:
    """Return the next state from summed gradients and losses: the last part of a step, traceable.

    It uses `weights` and `stop` of the batch.
    """
    tokens = jnp.sum(batch["weights"])
    gradients = jax.tree.map(lambda g: g / tokens, gradients)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in flatten_lora(gradients)))
    lora, variables = optimizer.stateless_apply(
        list(state.optimizer), flatten_lora(gradients), flatten_lora(state.lora)
    )
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
    new_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        TrainState(unflatten_lora(lora), tuple(variables)),
        state,
    )
    stop = jnp.sum(batch["stop"])
    return new_state, StepMetrics(sums.loss, sums.correct, tokens, norm, stop)


def make_validation(model: LanguageModel, forward: ForwardConfig) -> ValidationStep:
    """Return the compiled loss of one micro-batch `[1, ...]`, without dropout."""

    def sums(lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        rows = {name: array[0] for name, array in batch.items()}
        return loss_sums(model, weights, lora, rows, StepConfig(forward))

    return jax.jit(sums, out_shardings=model.replicated)
