"""One optimizer step and one validation pass, each one compiled function.

A step takes its rows as `[accumulation, rows, ...]`: gradients of summed losses are added
over the first axis and divided by the number of loss tokens of the whole batch, so the
result does not depend on how the batch is cut up.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from job.data.packing import Batch
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import Dropout, LoraWeights, Weights, flatten_lora, unflatten_lora
from job.train.loss import Head, LossSums, head_loss, slice_length


def kept_bytes(loss: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that reverse differentiation of `loss` by its first argument keeps.

    Arguments (arrays or their shapes) are not counted: they are there anyway.
    """

    def forward(*given: Any) -> Any:
        return jax.vjp(lambda first: loss(first, *given[1:]), given[0])[1]

    traced = jax.make_jaxpr(forward)(*arguments).jaxpr
    there = {id(variable) for variable in traced.invars}
    kept: dict[int, Any] = {
        id(v): v.aval for v in traced.outvars if hasattr(v, "aval") and id(v) not in there
    }
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values())


Arrays = dict[str, jax.Array]
"""A batch by field name (see `Batch`)."""


class TrainState(NamedTuple):
    """What a step changes: the adapter and the optimizer's variables."""

    lora: LoraWeights
    optimizer: tuple[jax.Array, ...]


class StepMetrics(NamedTuple):
    """Scalars of one step; sums over its loss tokens."""

    loss: jax.Array
    correct: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array
    stop: jax.Array
    """Above 0 where a process wants to stop."""


class StepConfig(NamedTuple):
    """What a training step does besides the optimizer's part."""

    forward: ForwardConfig
    dropout: float = 0.0
    label_smoothing: float = 0.0
    lora_plus_ratio: float = 1.0
    seed: int = 0


def shard_input(
    model: LanguageModel,
    batch: Batch,
    accumulation: int,
    losses: int,
    step: int = 0,
    *,
    stop: bool = False,
) -> Arrays:
    """A batch on the devices.

    Args:
        accumulation: parts that go through the model one after the other.
        losses: width of a device's list of loss positions in each part.
        step: its number, from which the parts' dropout follows.
        stop: whether this process wants to stop; the step's figures tell all of them.

    Returns:
        `token_ids` and `segment_ids` `[accumulation, rows, length]`, rows split over the devices,
        the lists of `Batch.flat_losses` `[accumulation, devices, losses]`, split likewise, the
        number of each part, `[accumulation]`, and `stop` `[data, model]`.
    """
    arrays = {
        name: getattr(batch, name).reshape(accumulation, -1, batch.token_ids.shape[1])
        for name in ("token_ids", "segment_ids")
    }
    flat = batch.flat_losses(accumulation * model.devices, losses)
    arrays |= {name: array.reshape(accumulation, model.devices, -1) for name, array in flat.items()}
    parts = np.arange(accumulation, dtype=np.int32) + step * accumulation
    placed: Arrays = model.shard_batch(arrays, axis=1)
    return placed | {"part": model.replicate(parts), "stop": model.process_local(stop)}


def padded_loss_count(most: int) -> int:
    """A width for lists of at most `most` loss positions; a multiple of 8 suits every device."""
    return max(8, -(-most // 8) * 8)


def dropout_for(recipe: StepConfig, part: jax.Array) -> Dropout | None:
    """The dropout of a part of a step, by its number."""
    if not recipe.dropout:
        return None
    return Dropout(recipe.dropout, jax.random.fold_in(jax.random.key(recipe.seed), part))


def head_sums(
    model: LanguageModel,
    head: Head,
    weights: Weights,
    states: jax.Array,
    lists: Arrays,
    smoothing: float,
) -> LossSums:
    """`head_loss` of the states `[devices, losses, hidden]` at a part's lists (`shard_input`)."""
    return head_loss(
        head,
        weights,
        states,
        lists["targets"],
        lists["weights"],
        length=slice_length(1, states.shape[1], model.vocabulary, states.dtype),
        unroll=model.platform == "cpu",
        smoothing=smoothing,
        capped=bool(getattr(model.backbone.token_embedding, "logit_soft_cap", None)),
    )


def _sums(
    model: LanguageModel, weights: Weights, lora: LoraWeights, rows: Arrays, recipe: StepConfig
) -> LossSums:
    dropout = dropout_for(recipe, rows["part"])
    states = model.hidden_states(weights, rows, recipe.forward, lora, dropout)
    return head_sums(model, model.logits, weights, states, rows, recipe.label_smoothing)


def _abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


def row_bytes(model: LanguageModel, recipe: StepConfig, length: int, losses: int) -> int:
    """Bytes that a device keeps for the backward pass of one row; only traced."""
    integers = {"token_ids": length, "segment_ids": length, "positions": losses, "targets": losses}
    rows = {name: _abstract((1, width), jnp.int32) for name, width in integers.items()}
    rows |= {"weights": _abstract((1, losses), jnp.float32), "part": _abstract((), jnp.int32)}
    weights = tuple(_abstract(weight.shape, weight.dtype) for weight in model.weights)
    lora = tuple(
        tuple(_abstract(shape, jnp.float32) for shape in model.lora.shapes(target))
        for target in model.lora.targets
    )

    def loss(lora: LoraWeights, weights: Weights, rows: Arrays) -> jax.Array:
        return _sums(model, weights, lora, rows, recipe).loss

    return kept_bytes(loss, lora, weights, rows)


def make_update(
    optimizer: Any, recipe: StepConfig
) -> Callable[
    [TrainState, LoraWeights, LossSums, jax.Array, jax.Array], tuple[TrainState, StepMetrics]
]:
    """What ends a step, traceable: from summed gradients and losses to the next state.

    The last arguments are the weights of the losses and `stop`, as in a batch.
    """

    def update(
        state: TrainState,
        gradients: LoraWeights,
        sums: LossSums,
        weights: jax.Array,
        stop: jax.Array,
    ) -> tuple[TrainState, StepMetrics]:
        tokens = jnp.sum(weights)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in flatten_lora(gradients)))
        arrays, variables = optimizer.stateless_apply(
            list(state.optimizer), flatten_lora(gradients), flatten_lora(state.lora)
        )
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        lora = _faster_b(state.lora, unflatten_lora(arrays), recipe.lora_plus_ratio)
        changed = TrainState(lora, tuple(variables))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        return kept, StepMetrics(sums.loss, sums.correct, tokens, norm, jnp.sum(stop))

    return update


def make_train_step(
    model: LanguageModel, optimizer: Any, recipe: StepConfig
) -> Callable[[TrainState, Weights, Arrays], tuple[TrainState, StepMetrics]]:
    """The compiled step. A step whose loss or gradient is not finite changes nothing."""
    unroll, update = model.platform == "cpu", make_update(optimizer, recipe)

    def loss(lora: LoraWeights, weights: Weights, rows: Arrays) -> tuple[jax.Array, LossSums]:
        sums = _sums(model, weights, lora, rows, recipe)
        return sums.loss, sums

    def step(state: TrainState, weights: Weights, batch: Arrays) -> tuple[TrainState, StepMetrics]:
        def accumulate(total: Any, rows: Arrays) -> tuple[Any, None]:
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(state.lora, weights, rows)
            return jax.tree.map(jnp.add, total, (gradients, sums)), None

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, state.lora), LossSums(zero, zero))
        parts = {name: array for name, array in batch.items() if name != "stop"}
        (gradients, sums), _ = jax.lax.scan(accumulate, start, parts, unroll=unroll)
        return update(state, gradients, sums, batch["weights"], batch["stop"])

    return jax.jit(step, donate_argnums=0, out_shardings=model.replicated)


def _faster_b(before: LoraWeights, after: LoraWeights, ratio: float) -> LoraWeights:
    """The step of B times `ratio` (LoRA+, Hayou et al. 2024)."""
    if ratio == 1.0:
        return after
    pairs = zip(before, after, strict=True)
    return tuple((a, old + ratio * (b - old)) for (_, old), (a, b) in pairs)


def make_validation(
    model: LanguageModel, settings: ForwardConfig
) -> Callable[[LoraWeights, Weights, Arrays], LossSums]:
    """The compiled sums over one part `[1, ...]` for an adapter."""

    def sums(lora: LoraWeights, weights: Weights, batch: Arrays) -> LossSums:
        rows = {name: array[0] for name, array in batch.items()}
        return _sums(model, weights, lora, rows, StepConfig(settings))

    return jax.jit(sums, out_shardings=model.replicated)
