"""The hidden states that have a loss, and no more of the last block than they need.

After the last block's attention nothing moves between positions: its feed-forward half, the
final norm and the head are only needed where there is a loss, less than half of the tokens
when the loss is on responses.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from job.model.tracing import replaced_calls

_HALVES = {
    "Gemma3Backbone": ("pre_ffw_norm", ("post_ffw_norm", "ffw_linear")),
    "GemmaBackbone": ("pre_ffw_norm", ("post_ffw_norm", "ffw_linear")),
    "LlamaBackbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "Llama3Backbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "MistralBackbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "Qwen3Backbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
}
"""First layer of a block's feed-forward half, and its last: the first of these names it has.

Families whose block is `h + last(...first(h))` after its attention, as a test shows.
"""


def gather(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden states that have a loss.

    Args:
        hidden: `[rows, length, hidden]`.
        positions: int32 `[groups, losses]` into the tokens of each equal part of the rows.

    Returns:
        `[groups, losses, hidden]`.
    """
    grouped = hidden.reshape(positions.shape[0], -1, hidden.shape[-1])
    return jnp.take_along_axis(grouped, positions[..., None], axis=1)


def can_narrow(backbone: Any) -> bool:
    """Whether the last block of this backbone can be cut in two."""
    return type(backbone).__name__ in _HALVES and backbone.compute_dtype != "float16"


@contextlib.contextmanager
def narrowed(backbone: Any, positions: jax.Array) -> Iterator[None]:
    """Within this block the backbone gives the hidden states at `positions` alone.

    They are `[groups, losses, hidden]`, as by `gather` of what it would give otherwise.
    """
    block = backbone.transformer_layers[-1]
    first, last = _halves(backbone, block)
    whole, enter, leave = block.call, first.call, last.call
    kept: dict[str, jax.Array] = {}

    def begin(x: Any, *args: Any, **kwargs: Any) -> Any:
        kept["residual"] = gather(x, positions)
        return enter(kept["residual"], *args, **kwargs)

    def end(x: Any, *args: Any, **kwargs: Any) -> Any:
        kept["update"] = leave(x, *args, **kwargs)
        return jnp.zeros((1, 1, 1), x.dtype)  # the block adds this to all positions, for nothing

    def narrow(x: Any, *args: Any, **kwargs: Any) -> Any:
        whole(x, *args, **kwargs)
        return kept["residual"] + kept["update"]

    with replaced_calls([(first, begin), (last, end), (block, narrow)]):
        yield


def _halves(backbone: Any, block: Any) -> tuple[Any, Any]:
    first, names = _HALVES[type(backbone).__name__]
    last = next(layer for name in names if (layer := getattr(block, name, None)) is not None)
    return getattr(block, first), last
