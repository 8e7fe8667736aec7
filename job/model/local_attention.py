"""Attention over no more keys than a query can see.

KerasHub's attention scores every query of a row against every key and masks most of it away:
what comes later, and in a packed row what belongs to other examples. In training the row is
cut into chunks instead, and each attends to itself and to the tokens before it that an example,
or the layer's sliding window, can reach. The chunks are one more batch axis, so the program is
no larger, and their masks are made from the segments, so that no mask of a whole row exists.
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


def keys_before(reach: int) -> int:
    """Keys in front of a chunk that its queries can see, a whole number of chunks."""
    return -(-(reach - 1) // CHUNK) * CHUNK


def is_cut(before: int, length: int) -> bool:
    """Whether chunks with so many keys before them are worth it: with half the keys or fewer.

    With more the TPU's compiler moves more bytes for the chunks than it saves.
    """
    return 2 * (before + CHUNK) <= length


@contextlib.contextmanager
def local_attention(backbone: Any, segments: Any, reach: int) -> Iterator[None]:
    """Within this block attention runs chunk by chunk, where that leaves enough out.

    Args:
        segments: int32 `[batch, length]`; 0 is padding, and tokens attend only to earlier tokens
            of the same number.
        reach: tokens, its own included, that a token can see at most.
    """
    layers = [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if hasattr(type(layer), "_compute_attention")
    ]
    for layer in layers:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__["_compute_attention"] = _by_chunk(layer, segments, reach)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_compute_attention"]


def _by_chunk(layer: Any, segments: Any, reach: int) -> Callable[..., Any]:
    attend = layer._compute_attention
    # Some families lay the window over the mask they are given, others over all masks before.
    placed = "cache_update_index" in inspect.signature(attend).parameters
    window = getattr(layer, "_sliding_window", None)
    if getattr(layer, "use_sliding_window_attention", False):
        window = layer.sliding_window_size
    reach = min(reach, window or reach)
    before = keys_before(reach)

    def by_chunk(query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        batch, length = query.shape[:2]
        if not is_cut(before, length):
            return attend(query, key, value, mask, **settings)
        if placed:
            settings["cache_update_index"] = before
        count = -(-length // CHUNK)
        after = count * CHUNK - length

        def chunks(array: Any) -> Any:
            return _pad(array, 0, after).reshape(batch * count, CHUNK, *array.shape[2:])

        def windows(array: Any) -> Any:
            padded = _pad(array, before, after)
            whole = padded.reshape(batch, -1, CHUNK, *array.shape[2:])
            # Slices side by side and no gather, whose gradient would be a scatter.
            parts = [whole[:, first : first + count] for first in range(before // CHUNK + 1)]
            joined = jnp.concatenate(parts, axis=2)
            return joined.reshape(batch * count, before + CHUNK, *array.shape[2:])

        parts = attend(
            chunks(query),
            windows(key),
            windows(value),
            _mask(chunks(segments), windows(segments), window),
            **settings,
        )
        return parts.reshape(batch, count * CHUNK, *parts.shape[2:])[:, :length]

    return by_chunk


def _mask(queries: Any, keys: Any, window: int | None) -> Any:
    """Which keys each query sees, bool `[chunks, CHUNK, keys]`, from the segments of both.

    The queries are the last of the keys.
    """
    distance = (
        jnp.arange(queries.shape[1])[:, None]
        + (keys.shape[1] - queries.shape[1])
        - jnp.arange(keys.shape[1])
    )
    near = (distance >= 0) & (distance < (window or keys.shape[1]))
    same = queries[:, :, None] == keys[:, None, :]
    return near & same & (keys > 0)[:, None, :]


def _pad(array: Any, before: int, after: int) -> Any:
    """Zeros along the second axis."""
    return jnp.pad(array, ((0, 0), (before, after)) + ((0, 0),) * (array.ndim - 2))
