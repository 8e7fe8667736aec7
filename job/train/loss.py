"""Chunked cross-entropy: the loss at selected positions, without materializing all logits.

The output projection is the widest matrix of a model (262,144 columns in Gemma 3), so it is
applied only to hidden states that predict a target, one chunk at a time. Because the projection is
frozen and the loss is a plain sum, each chunk's gradient with respect to its hidden states is
computed in the forward pass and its logits are discarded: nothing is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from job.machine.limits import LOGITS_SLICE_BYTES

Head = Callable[[Any, jax.Array], jax.Array]
"""Maps frozen weights and hidden states `[..., hidden]` to float32 logits `[..., vocabulary]`."""

_Sums = tuple[jax.Array, jax.Array]
_Chunk = tuple[jax.Array, jax.Array, jax.Array]


class LossSums(NamedTuple):
    """Sums over the positions with a loss: float32 scalars."""

    loss: jax.Array
    correct: jax.Array


class LossOptions(NamedTuple):
    """How the loss is computed; static, so part of the compiled program."""

    chunk_length: int
    """Positions per row in one chunk."""
    unroll: bool
    """Emit the chunks one after another instead of as a loop; faster on CPUs."""
    soft_cap: bool = False
    """Whether the logits end in a soft cap. A TPU's compiler rounds values it fuses, such as a
    maximum, after the cap, and values it stores before it."""


def chunk_length(rows: int, losses: int, vocabulary: int, dtype: Any) -> int:
    """Return how many positions per row fit in `LOGITS_SLICE_BYTES`, in chunks of about equal size.

    Args:
        rows: rows of hidden states on a device.
        losses: positions per row.
        vocabulary: columns of the logits.
        dtype: compute dtype of the logits; only sums are float32.
    """
    fits = max(1, LOGITS_SLICE_BYTES // (int(jnp.dtype(dtype).itemsize) * rows * vocabulary))
    chunks = -(-losses // fits)
    return -(-losses // chunks)


def chunked_cross_entropy(
    head: Head,
    head_weights: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossOptions,
) -> LossSums:
    """Compute the summed cross-entropy and the number of correct predictions.

    Args:
        head: output projection.
        head_weights: weights of the projection; frozen, so they get no gradient.
        hidden: `[batch, losses, hidden]`.
        targets: int32 `[batch, losses]`.
        weights: float32 `[batch, losses]`; 0 masks a position.
        options: static options.
    """
    batch, losses = targets.shape
    length = options.chunk_length
    chunks = -(-losses // length)
    pad = chunks * length - losses

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, chunks, length, *array.shape[2:]), 1, 0)

    arrays = split(hidden), split(targets), split(weights)
    return LossSums(*_sum_chunks(head, options, head_weights, *arrays))


def _chunk_sums(head: Head, options: LossOptions, head_weights: Any, *chunk: jax.Array) -> _Sums:
    hidden, targets, weights = chunk
    logits = head(head_weights, hidden)
    columns = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = targets[..., None]
    target_logit = jnp.sum(jnp.where(columns == target, logits, 0), axis=-1)
    if options.soft_cap:
        correct = jnp.argmax(logits, axis=-1) == targets
    else:
        # argmax without a second pass over the logits: the target has the maximum, and no
        # earlier column has it too.
        best = jnp.max(logits, axis=-1, keepdims=True)
        earlier = jnp.sum(((logits >= best) & (columns < target)).astype(logits.dtype), axis=-1)
        correct = (target_logit >= best[..., 0]) & (earlier == 0)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logit
    return jnp.sum(losses * weights), jnp.sum(correct.astype(jnp.float32) * weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_chunks(
    head: Head,
    options: LossOptions,
    head_weights: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> _Sums:
    def add(total: _Sums, chunk: _Chunk) -> tuple[_Sums, None]:
        loss, correct = _chunk_sums(head, options, head_weights, *chunk)
        return (total[0] + loss, total[1] + correct), None

    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(add, (zero, zero), (hidden, targets, weights), unroll=options.unroll)
    return total


def _sum_chunks_forward(
    head: Head, options: LossOptions, head_weights: Any, *chunks: jax.Array
) -> tuple[_Sums, jax.Array]:
    def add(total: _Sums, chunk: _Chunk) -> tuple[_Sums, jax.Array]:
        hidden, targets, weights = chunk
        loss, vjp, correct = jax.vjp(
            lambda h: _chunk_sums(head, options, head_weights, h, targets, weights),
            hidden,
            has_aux=True,
        )
        (gradient,) = vjp(jnp.ones((), jnp.float32))
        return (total[0] + loss, total[1] + correct), gradient

    zero = jnp.zeros((), jnp.float32)
    hidden, targets, weights = chunks
    return jax.lax.scan(add, (zero, zero), (hidden, targets, weights), unroll=options.unroll)


def _sum_chunks_backward(
    _head: Head, _options: LossOptions, gradients: jax.Array, cotangents: _Sums
) -> tuple[None, jax.Array, None, None]:
    return (None, gradients * cotangents[0].astype(gradients.dtype), None, None)


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward)
