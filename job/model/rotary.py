"""Rotary position embeddings (Su et al. 2021): a faster form, and their constants as arguments."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from keras_hub.layers import RotaryEmbedding

from job.model.patching import Patch, patched


def rotary_layers(layer: Any) -> list[Any]:
    """List the rotary embeddings inside a layer, in KerasHub's order."""
    parts = layer._flatten_layers(include_self=False)
    return [part for part in parts if isinstance(part, RotaryEmbedding)]


def fast_rotary(backbone: Any) -> AbstractContextManager[None]:
    """Make the backbone's rotary embeddings multiply each half of the features separately.

    KerasHub computes cosines and sines twice, once for each half. The result is the same bit
    for bit.
    """
    name = "_apply_rotary_pos_emb"
    return patched([
        Patch(layer, name, _rotate_halves)
        for layer in rotary_layers(backbone)
        if type(layer)._apply_rotary_pos_emb is RotaryEmbedding._apply_rotary_pos_emb
    ])  # fmt: skip


def _rotate_halves(x: Any, cosines: Any, sines: Any) -> Any:
    """Rotate `x` `[..., features]` by angles whose two halves are the same."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cosines, sines = cosines[..., :half], sines[..., :half]
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(rotated, axis=-1)


def has_linear_scaling(rotary: Any) -> bool:
    """Tell whether wavelength and scaling factor determine a rotary embedding."""
    default = type(rotary)._get_inverse_freq is RotaryEmbedding._get_inverse_freq
    return default and rotary.rope_type == "linear"


def rotary_constants(layer: Any) -> list[tuple[float, float]]:
    """List (wavelength, scaling factor) of each rotary embedding inside a layer."""
    return [(part.max_wavelength, part.scaling_factor) for part in rotary_layers(layer)]


def with_rotary_constants(layer: Any, constants: jax.Array) -> AbstractContextManager[None]:
    """Give a layer's linear rotary embeddings these constants, float32 `[embeddings, 2]`."""
    pairs: Iterable[tuple[Any, Any]] = zip(rotary_layers(layer), constants, strict=True)
    return patched([
        Patch(part, name, value)
        for part, values in pairs
        if has_linear_scaling(part)
        for name, value in zip(("max_wavelength", "scaling_factor"), values, strict=True)
    ])  # fmt: skip
