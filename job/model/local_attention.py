"""Attention over no more keys than a query can see.

KerasHub's attention scores every query of a row against every key and masks most of it away:
what comes later, and in a packed row what belongs to other examples. In training the row is
cut into chunks instead, and each attends to itself and to the tokens before it that an example,
or the layer's sliding window, can reach. The mask still decides; what is left out it would
have hidden. The chunks are one more batch axis, so the program is no larger.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from job.model.segments import PACKABLE

CHUNK = 128
"""Queries that share their keys."""


def can_cut(backbone: Any) -> bool:
    """Whether a test shows that this family's attention may be cut into chunks."""
    return type(backbone).__name__ in PACKABLE


@contextlib.contextmanager
def local_attention(backbone: Any, reach: int) -> Iterator[None]:
    """Within this block attention runs chunk by chunk, where that leaves something out.

    Args:
        reach: tokens, its own included, that a token can see at most.
    """
    layers = [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if hasattr(type(layer), "_compute_attention")
    ]
    for layer in layers:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__["_compute_attention"] = _by_chunk(layer, reach)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_compute_attention"]


def _by_chunk(layer: Any, reach: int) -> Callable[..., Any]:
    attend = layer._compute_attention
    placed = "cache_update_index" in inspect.signature(attend).parameters
    if getattr(layer, "use_sliding_window_attention", False):
        reach = min(reach, layer.sliding_window_size)
    before = -(-(reach - 1) // CHUNK) * CHUNK

    def by_chunk(query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        batch, length = query.shape[:2]
        if before + CHUNK >= length:
            return attend(query, key, value, mask, **settings)
        if placed:  # where the queries stand among the keys, for a sliding window
            settings["cache_update_index"] = before
        count = -(-length // CHUNK)
        after = count * CHUNK - length
        seen = _windows(count, before)
        parts = attend(
            _pad(query, 0, after).reshape(batch * count, CHUNK, *query.shape[2:]),
            *(
                _pad(array, before, after)[:, seen].reshape(batch * count, -1, *array.shape[2:])
                for array in (key, value)
            ),
            _cut_mask(mask, seen, before, after),
            **settings,
        )
        return parts.reshape(batch, count * CHUNK, *parts.shape[2:])[:, :length]

    return by_chunk


def _windows(count: int, before: int) -> Any:
    """The keys of each chunk, `[count, before + CHUNK]`, where `before` keys were put in front."""
    return CHUNK * jnp.arange(count)[:, None] + jnp.arange(before + CHUNK)


def _pad(array: Any, before: int, after: int) -> Any:
    """Zeros along the second axis."""
    return jnp.pad(array, ((0, 0), (before, after)) + ((0, 0),) * (array.ndim - 2))


def _cut_mask(mask: Any, seen: Any, before: int, after: int) -> Any:
    """The mask `[batch, length, length]` as `[batch * count, CHUNK, before + CHUNK]`."""
    padded = jnp.pad(mask, ((0, 0), (0, after), (before, after)))
    rows = padded.reshape(len(mask), len(seen), CHUNK, -1)
    cut = jnp.take_along_axis(rows, seen[None, :, None], axis=-1)
    return cut.reshape(-1, *cut.shape[2:])
