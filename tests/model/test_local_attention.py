"""Chunked attention gives the hidden states of attention over the full row."""

from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
import pytest

from job.model.attention import Chunking, chunked_attention, segment_attention
from tests.model.families import BY_FAMILY, small_backbone

LENGTH, LONGEST = 45, 9


def rows() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 64, size=(2, LENGTH)).astype(np.int32)
    segment_ids = np.zeros((2, LENGTH), np.int32)
    for row, parts in enumerate(([9, 5, 9, 8, 9], [2, 9, 7, 9])):
        numbers = np.repeat(np.arange(1, len(parts) + 1), parts)
        segment_ids[row, : len(numbers)] = numbers
    return {"token_ids": tokens, "padding_mask": segment_ids}


def states(backbone: Any, longest: int = 0, cut: Chunking | None = None) -> np.ndarray:
    """The hidden states of `rows()`, chunked or not, by a program of their own."""

    def forward(inputs: dict[str, jax.Array]) -> jax.Array:
        mask = inputs["padding_mask"]
        chunked = chunked_attention(backbone, mask, longest, cut) if cut else nullcontext()
        with segment_attention(backbone), chunked:
            return backbone(inputs)

    return np.asarray(jax.jit(forward)(rows()))


@pytest.mark.parametrize("family", BY_FAMILY)
def test_chunked_and_full_attention_agree(family: str) -> None:
    backbone, inputs = small_backbone(family), rows()
    real = inputs["padding_mask"] > 0
    full = states(backbone)[real]
    for cut in (Chunking(4, 1.0), Chunking(7, 2.0)):
        assert cut.fits(cut.before(LONGEST), LENGTH)
        np.testing.assert_allclose(states(backbone, LONGEST, cut)[real], full, atol=2e-5)


def test_a_limit_that_is_too_short_changes_the_states() -> None:
    backbone = small_backbone("LlamaBackbone")
    assert np.abs(states(backbone, 2, Chunking(4, 1.0)) - states(backbone)).max() > 1e-3


def test_fewer_products_are_computed() -> None:
    backbone = small_backbone("Gemma3Backbone", sliding_window_size=64, head_dim=64)
    inputs = {name: np.ones((1, 512), np.int32) for name in ("token_ids", "padding_mask")}

    def flops(longest: int, cut: Chunking) -> float:
        def forward(inputs: dict[str, jax.Array]) -> jax.Array:
            with chunked_attention(backbone, inputs["padding_mask"], longest, cut):
                return backbone(inputs)

        return float(jax.jit(forward).lower(inputs).cost_analysis()["flops"])

    full, windows = flops(512, Chunking(512, 1.0)), flops(512, Chunking(64, 2.0))
    assert windows < 0.5 * full  # the sliding windows
    assert flops(128, Chunking(64, 2.0)) < 0.9 * windows  # the global layer too
    assert flops(512, Chunking(64, 16.0)) > 0.95 * full  # chunks would not pay off
