"""Attention for packed and padded rows: replaces the masks that KerasHub's layers build.

KerasHub's decoder blocks build their attention mask from the padding mask in one method. Within
`segment_attention` that method also looks at segment ids, which travel in place of the padding
mask: 0 is padding, and tokens attend only to tokens of their own segment. Positions need no
reset, since rotary embeddings are relative.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from job.machine.limits import ATTENTION_CHUNK
from job.model.patching import Patch, patched

_MASK_METHODS = ("_compute_attention_mask", "_compute_self_attention_mask")


def _patched_masks(
    backbone: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """Replace each method that builds an attention mask with what `wrap` makes of it."""
    return patched([
        Patch(layer, name, wrap(getattr(layer, name)))
        for layer in backbone._flatten_layers(include_self=False)
        for name in _MASK_METHODS
        if hasattr(type(layer), name)
    ])  # fmt: skip


def segment_attention(backbone: Any) -> AbstractContextManager[None]:
    """Make the backbone read its padding mask as segment ids, int32 `[batch, length]`."""
    return _patched_masks(backbone, _within_segments)


def _within_segments(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(make_mask)
    key = next(name for name in signature.parameters if name.endswith("padding_mask"))

    def masked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        segment_ids = jnp.asarray(bound.arguments[key], jnp.int32)
        bound.arguments[key] = jnp.asarray(segment_ids > 0, jnp.int32)
        mask = jnp.asarray(make_mask(*bound.args, **bound.kwargs), bool)
        return mask & (segment_ids[:, :, None] == segment_ids[:, None, :])

    return masked


def left_padded_attention(backbone: Any, starts: jax.Array) -> AbstractContextManager[None]:
    """Hide the keys before each row's first token, whose index is in `starts`, int32 `[batch]`."""

    def hidden_before_start(make_mask: Callable[..., Any]) -> Callable[..., Any]:
        def masked(*args: Any, **kwargs: Any) -> Any:
            mask = jnp.asarray(make_mask(*args, **kwargs), bool)
            return mask & (jnp.arange(mask.shape[-1]) >= starts[:, None, None])

        return masked

    return _patched_masks(backbone, hidden_before_start)


class Chunking(NamedTuple):
    """Chunk size, and when chunking pays off."""

    queries: int
    """Queries in a chunk."""
    gain: float
    """Minimum factor by which chunking must shrink the keys per query."""

    def before(self, longest: int) -> int:
        """Count the keys in front of a chunk that its queries can see, in full chunks.

        Args:
            longest: tokens, its own included, that a query can see at most.
        """
        return -(-(longest - 1) // self.queries) * self.queries

    def fits(self, before: int, length: int) -> bool:
        """Tell whether chunks with `before` keys in front pay off in rows of `length` tokens."""
        return self.gain * (before + self.queries) <= length


ACCELERATOR = Chunking(ATTENTION_CHUNK, 2.0)
"""Below this gain, XLA on TPU moves more bytes than chunking saves."""

CPU = Chunking(32, 1.0)
"""Every key that is skipped saves time; smaller chunks make products that are too small."""


def chunked_attention(
    backbone: Any, segment_ids: jax.Array, longest: int, chunking: Chunking
) -> AbstractContextManager[None]:
    """Make attention skip, chunk by chunk, keys that no query of the chunk can see.

    Args:
        segment_ids: as for `LanguageModel.hidden_states`.
        longest: tokens of the longest segment, or more.
        chunking: how the rows are cut.
    """
    return patched([
        Patch(layer, "_compute_attention", _by_chunk(layer, segment_ids, longest, chunking))
        for layer in backbone._flatten_layers(include_self=False)
        if hasattr(type(layer), "_compute_attention")
    ])  # fmt: skip


def _by_chunk(
    layer: Any, segment_ids: jax.Array, longest: int, chunking: Chunking
) -> Callable[..., Any]:
    attend = layer._compute_attention
    # Some families apply the window to the mask they are given, others earlier, to all masks.
    applies_window = "cache_update_index" in inspect.signature(attend).parameters
    window = getattr(layer, "_sliding_window", None)
    if getattr(layer, "use_sliding_window_attention", False):
        window = layer.sliding_window_size
    before, queries = chunking.before(min(longest, window or longest)), chunking.queries

    def by_chunk(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        batch, length = query.shape[:2]
        if not chunking.fits(before, length):
            return attend(query, key, value, mask, **options)
        if applies_window:
            options["cache_update_index"] = before
        count = -(-length // queries)
        after = count * queries - length

        def chunks(array: Any) -> Any:
            """`[batch * count, queries, ...]`."""
            return _pad(array, 0, after).reshape(batch * count, queries, *array.shape[2:])

        def windows(array: Any) -> Any:
            """`[batch * count, before + queries, ...]`."""
            padded = _pad(array, before, after)
            rows = padded.reshape(batch, -1, queries, *array.shape[2:])
            # Slices next to each other instead of a gather, whose gradient would be a scatter.
            parts = [rows[:, first : first + count] for first in range(before // queries + 1)]
            joined = jnp.concatenate(parts, axis=2)
            return joined.reshape(batch * count, before + queries, *array.shape[2:])

        parts = attend(
            chunks(query),
            windows(key),
            windows(value),
            _chunk_mask(chunks(segment_ids), windows(segment_ids), window),
            **options,
        )
        return parts.reshape(batch, count * queries, *parts.shape[2:])[:, :length]

    return by_chunk


def _chunk_mask(queries: Any, keys: Any, window: int | None) -> Any:
    """Return which keys each query sees, bool `[chunks, queries, keys]`, by their segment ids.

    The queries, `[chunks, queries]`, are the last of the keys, `[chunks, keys]`.
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
    """Add zeros along the second axis."""
    return jnp.pad(array, ((0, 0), (before, after)) + ((0, 0),) * (array.ndim - 2))
