"""The last decoder block, run in full only at the positions whose hidden states are needed.

Attention of the last block still needs every key. Its feed-forward half, most of the block's
work, needs only the positions that have a loss or are scored.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from job.model.families import family_of
from job.model.patching import Patch, patched


def gather_positions(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """Pick hidden states by position.

    Args:
        hidden: `[rows, length, hidden]`.
        positions: int32 `[groups, n]`; group `g` indexes the flattened tokens of the `g`-th of
            `groups` equal parts of the rows.

    Returns:
        `[groups, n, hidden]`.
    """
    grouped = hidden.reshape(positions.shape[0], -1, hidden.shape[-1])
    return jnp.take_along_axis(grouped, positions[..., None], axis=1)


def narrow_last_block(backbone: Any, positions: jax.Array) -> AbstractContextManager[None]:
    """Make the backbone of a listed family return the hidden states at `positions` only.

    Within the `with` block it returns `[groups, n, hidden]`, equal to `gather_positions` of what
    it returns otherwise.
    """
    family = family_of(backbone)
    assert family is not None
    block = backbone.transformer_layers[-1]
    first = getattr(block, family.first)
    last = next(layer for name in family.last if (layer := getattr(block, name, None)) is not None)
    run_block, run_first, run_last = block.call, first.call, last.call
    saved: dict[str, jax.Array] = {}

    def narrowed_first(x: Any, *args: Any, **kwargs: Any) -> Any:
        saved["residual"] = gather_positions(x, positions)
        return run_first(saved["residual"], *args, **kwargs)

    def captured_last(x: Any, *args: Any, **kwargs: Any) -> Any:
        saved["update"] = run_last(x, *args, **kwargs)
        return jnp.zeros((1, 1, 1), x.dtype)  # added to all positions by the block, and discarded

    def narrowed_block(x: Any, *args: Any, **kwargs: Any) -> Any:
        run_block(x, *args, **kwargs)
        return saved["residual"] + saved["update"]

    return patched([
        Patch(first, "call", narrowed_first),
        Patch(last, "call", captured_last),
        Patch(block, "call", narrowed_block),
    ])  # fmt: skip
