"""Small random backbones of the families in `job.model.families`."""

import keras_hub
import pytest

from job.model.families import FAMILIES

SHAPE = {"vocabulary_size": 64, "num_layers": 6, "hidden_dim": 16, "intermediate_dim": 32}
HEADS = {"num_query_heads": 2, "num_key_value_heads": 1}
WINDOW = {"use_sliding_window_attention": True, "sliding_window_size": 5}
ARGUMENTS: dict[str, dict[str, object]] = {
    "Gemma3Backbone": {"head_dim": 8, "image_size": 0, **WINDOW},
    "GemmaBackbone": {"head_dim": 8, **WINDOW},
    "LlamaBackbone": {},
    "Llama3Backbone": {},
    "MistralBackbone": {"sliding_window": 5},
    "Qwen3Backbone": {"head_dim": 8},
}

USUAL = ("Gemma3Backbone", "LlamaBackbone")
"""Families of the default run: one with windows and more norms than the other."""


def small_backbone(family: str, **arguments: object) -> keras_hub.models.Backbone:
    """Make a small random backbone; Gemma 3's sixth layer is its first global one."""
    layers = 6 if family == "Gemma3Backbone" else 2
    defaults = {**SHAPE, **HEADS, **ARGUMENTS[family], "num_layers": layers, "dtype": "float32"}
    return getattr(keras_hub.models, family)(**defaults | arguments)


BY_FAMILY = [
    pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in FAMILIES
]
"""Parameters of a test of each family: all but Gemma 3 and Llama are slow tests."""
