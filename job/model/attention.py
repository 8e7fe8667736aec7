"""Attention that stays inside each example of a packed row.

KerasHub's decoder blocks make their attention mask from the padding mask in one method.
While a function is traced inside `segment_attention`, that method also looks at segment ids,
which ride in the padding mask: 0 is padding, and tokens see only tokens of their own
segment. Positions need no reset where they are rotary, since those are relative.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

_METHODS = ("_compute_attention_mask", "_compute_self_attention_mask")


PACKABLE = (
    "Gemma3Backbone",
    "GemmaBackbone",
    "LlamaBackbone",
    "Llama3Backbone",
    "MistralBackbone",
    "Qwen3Backbone",
)
"""Backbones for which a test shows that packed and unpacked hidden states agree."""


def can_pack(backbone: Any) -> bool:
    """Whether rows of several examples are sound for this backbone."""
    return type(backbone).__name__ in PACKABLE and len(list(mask_makers(backbone))) > 0


def mask_makers(backbone: Any) -> Iterator[tuple[Any, str]]:
    """The layers that make attention masks, each with the name of the method that does."""
    for layer in backbone._flatten_layers(include_self=False):
        for name in _METHODS:
            if hasattr(type(layer), name):
                yield layer, name


@contextlib.contextmanager
def segment_attention(backbone: Any) -> Iterator[None]:
    """Within this block the backbone reads its padding mask as segment ids."""
    patched = list(mask_makers(backbone))
    for layer, name in patched:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__[name] = _by_segment(getattr(layer, name))
    try:
        yield
    finally:
        for layer, name in patched:
            del layer.__dict__[name]


def _by_segment(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(make_mask)
    key = next(name for name in signature.parameters if name.endswith("padding_mask"))

    def with_segments(*args: Any, **kwargs: Any) -> Any:
        from keras import ops

        bound = signature.bind(*args, **kwargs)
        segment_ids = ops.cast(bound.arguments[key], "int32")
        bound.arguments[key] = ops.cast(segment_ids > 0, "int32")
        mask = make_mask(*bound.args, **bound.kwargs)
        same = ops.equal(segment_ids[:, :, None], segment_ids[:, None, :])
        return ops.logical_and(ops.cast(mask, "bool"), same)

    return with_segments


class Chunking(NamedTuple):
    """How rows are cut."""

    queries: int
    """Of a chunk: they share their keys."""
    gain: float
    """How many times fewer keys there must be for it to be worth it."""

    def before(self, reach: int) -> int:
        """Keys in front of a chunk that its queries can see, a whole number of chunks."""
        return -(-(reach - 1) // self.queries) * self.queries

    def fits(self, before: int, length: int) -> bool:
        """Whether chunks with so many keys before them are worth it in rows of `length`."""
        return self.gain * (before + self.queries) <= length


ACCELERATOR = Chunking(128, 2.0)
"""With more keys the TPU's compiler moves more bytes for the chunks than it saves."""


CPU = Chunking(32, 1.0)
"""What is not computed is saved; smaller chunks make products that are too small."""


def can_chunk(backbone: Any) -> bool:
    """Whether a test shows that this family's attention may be cut into chunks."""
    return type(backbone).__name__ in PACKABLE


@contextlib.contextmanager
def chunked_attention(backbone: Any, segment_ids: Any, reach: int, cut: Chunking) -> Iterator[None]:
    """Within this block attention runs chunk by chunk, where that leaves enough out.

    Args:
        segment_ids: int32 `[batch, length]`; 0 is padding, and tokens attend only to earlier tokens
            of the same number.
        reach: tokens, its own included, that a token can see at most.
        cut: how the rows are cut.
    """
    layers = [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if hasattr(type(layer), "_compute_attention")
    ]
    for layer in layers:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__["_compute_attention"] = _by_chunk(layer, segment_ids, reach, cut)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_compute_attention"]


def _by_chunk(layer: Any, segment_ids: Any, reach: int, cut: Chunking) -> Callable[..., Any]:
    attend = layer._compute_attention
    # Some families lay the window over the mask they are given, others over all masks before.
    placed = "cache_update_index" in inspect.signature(attend).parameters
    window = getattr(layer, "_sliding_window", None)
    if getattr(layer, "use_sliding_window_attention", False):
        window = layer.sliding_window_size
    reach = min(reach, window or reach)
    before, queries = cut.before(reach), cut.queries

    def by_chunk(query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        batch, length = query.shape[:2]
        if not cut.fits(before, length):
            return attend(query, key, value, mask, **settings)
        if placed:
            settings["cache_update_index"] = before
        count = -(-length // queries)
        after = count * queries - length

        def chunks(array: Any) -> Any:
            return _pad(array, 0, after).reshape(batch * count, queries, *array.shape[2:])

        def windows(array: Any) -> Any:
            padded = _pad(array, before, after)
            whole = padded.reshape(batch, -1, queries, *array.shape[2:])
            # Slices side by side and no gather, whose gradient would be a scatter.
            parts = [whole[:, first : first + count] for first in range(before // queries + 1)]
            joined = jnp.concatenate(parts, axis=2)
            return joined.reshape(batch * count, before + queries, *array.shape[2:])

        parts = attend(
            chunks(query),
            windows(key),
            windows(value),
            _mask(chunks(segment_ids), windows(segment_ids), window),
            **settings,
        )
        return parts.reshape(batch, count * queries, *parts.shape[2:])[:, :length]

    return by_chunk


def _mask(queries: Any, keys: Any, window: int | None) -> Any:
    """Which keys each query sees, bool `[chunks, queries, keys]`, from the segment_ids of both.

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
