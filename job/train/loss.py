"""Cross-entropy at the positions that have a loss, without ever holding all logits.

The head of a language model is the widest matrix of all (262,144 columns in Gemma 3), so it
is applied only to the hidden states that predict something, a slice at a time. Because the
head is frozen and the loss a plain sum, each slice's gradient with respect to its hidden
states is made in the forward pass and its logits are forgotten: nothing is computed twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Head = Callable[[Any, jax.Array], jax.Array]
"""Float32 logits `[..., vocabulary]` of frozen weights and hidden states `[..., hidden]`."""


_Pair = tuple[jax.Array, jax.Array]


_Part = tuple[jax.Array, jax.Array, jax.Array]


SLICE_BYTES = 2**30
"""Logits held at once on a device, in bytes of their type; each slice reads the head again."""


class LossSums(NamedTuple):
    """Sums over the positions with a loss: float32 scalars."""

    loss: jax.Array
    correct: jax.Array


class Way(NamedTuple):
    """How the sums are made; fixed when the program is compiled."""

    unroll: bool
    smoothing: float
    capped: bool


def slice_length(rows: int, losses: int, vocabulary: int, dtype: Any) -> int:
    """Positions of each row for which logits are held at once: a divisor-friendly bound.

    Args:
        dtype: of the hidden states, and of what is held: only sums are float32.
    """
    fits = max(1, SLICE_BYTES // (int(jnp.dtype(dtype).itemsize) * rows * vocabulary))
    slices = -(-losses // fits)
    return -(-losses // slices)


def head_loss(
    head: Head,
    frozen: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    length: int,
    unroll: bool,
    smoothing: float = 0.0,
    capped: bool = False,
) -> LossSums:
    """Summed cross-entropy and count of right predictions.

    Args:
        head: the frozen head, and
        frozen: its weights; no gradient flows into them.
        hidden: `[batch, losses, hidden]`.
        targets: int32 `[batch, losses]`.
        weights: float32 `[batch, losses]`.
        length: positions of each row handled at once.
        smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2015).
        capped: whether the head ends in a soft cap. A TPU's compiler rounds what it finds on the
            way, such as a maximum, after the cap, and what it stores before it.
        unroll: slices one after the other in the program instead of in a loop; faster on CPUs.
    """
    batch, losses = targets.shape
    slices = -(-losses // length)
    pad = slices * length - losses

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, pad)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, slices, length, *array.shape[2:]), 1, 0)

    sums = _sliced(
        head, Way(unroll, smoothing, capped), frozen, cut(hidden), cut(targets), cut(weights)
    )
    return LossSums(*sums)


def _slice_sums(
    head: Head,
    way: Way,
    frozen: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> _Pair:
    logits = head(frozen, hidden)
    columns = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target = targets[..., None]
    chosen = jnp.sum(jnp.where(columns == target, logits, 0), axis=-1)
    if way.capped:
        correct = jnp.argmax(logits, axis=-1) == targets
    else:
        # The same without another look at all logits: the target is the best, none before it is.
        best = jnp.max(logits, axis=-1, keepdims=True)
        earlier = jnp.sum(((logits >= best) & (columns < target)).astype(logits.dtype), axis=-1)
        correct = (chosen >= best[..., 0]) & (earlier == 0)
    if way.smoothing:
        chosen = (1 - way.smoothing) * chosen + way.smoothing * jnp.mean(logits, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(losses * weights), jnp.sum(correct.astype(jnp.float32) * weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sliced(
    head: Head,
    way: Way,
    frozen: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> _Pair:
    def add(total: _Pair, part: _Part) -> tuple[_Pair, None]:
        loss, correct = _slice_sums(head, way, frozen, *part)
        return (total[0] + loss, total[1] + correct), None

    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(add, (zero, zero), (hidden, targets, weights), unroll=way.unroll)
    return total


def _forward(
    head: Head,
    way: Way,
    frozen: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[_Pair, jax.Array]:
    def add(total: _Pair, part: _Part) -> tuple[_Pair, jax.Array]:
        states, target, weight = part
        loss, pull, correct = jax.vjp(
            lambda h: _slice_sums(head, way, frozen, h, target, weight), states, has_aux=True
        )
        (gradient,) = pull(jnp.ones((), jnp.float32))
        return (total[0] + loss, total[1] + correct), gradient

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), (hidden, targets, weights), unroll=way.unroll)


def _backward(
    _head: Head, _way: Way, gradients: jax.Array, cotangents: _Pair
) -> tuple[None, jax.Array, None, None]:
    return (None, gradients * cotangents[0].astype(gradients.dtype), None, None)


_sliced.defvjp(_forward, _backward)
