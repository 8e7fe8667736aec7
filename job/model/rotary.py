"""The constants of rotary position embeddings (Su et al. 2021) as arguments."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
from keras_hub.layers import RotaryEmbedding

from job.model.patching import Patch, patched


def rotary_layers(layer: Any) -> list[Any]:
    """List the rotary embeddings inside a layer, in KerasHub's order."""
    parts = layer._flatten_layers(include_self=False)
    return [part for part in parts if isinstance(part, RotaryEmbedding)]


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
