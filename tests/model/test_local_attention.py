"""Chunked attention gives the hidden states of attention over the full row."""

import jax
import numpy as np
import pytest

from job.model.attention import Chunking, chunked_attention, segment_attention
from tests.model.families import families_with, small_backbone

LENGTH, LONGEST = 45, 9


def rows() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 64, size=(2, LENGTH)).astype(np.int32)
    segment_ids = np.zeros((2, LENGTH), np.int32)
    for row, parts in enumerate(([9, 5, 9, 8, 9], [2, 9, 7, 9])):
        numbers = np.repeat(np.arange(1, len(parts) + 1), parts)
        segment_ids[row, : len(numbers)] = numbers
    return {"token_ids": tokens, "padding_mask": segment_ids}


@pytest.mark.parametrize("family", families_with("chunked_attention"))
@pytest.mark.parametrize("cut", [Chunking(4, 1.0), Chunking(7, 2.0)])
def test_chunked_and_full_attention_agree(family: str, cut: Chunking) -> None:
    backbone, inputs = small_backbone(family), rows()
    assert cut.fits(cut.before(LONGEST), LENGTH)
    with segment_attention(backbone):
        full = backbone(inputs)
        with chunked_attention(backbone, inputs["padding_mask"], LONGEST, cut):
            ours = backbone(inputs)
    real = inputs["padding_mask"] > 0
    np.testing.assert_allclose(np.asarray(ours)[real], np.asarray(full)[real], atol=2e-5)


def test_a_limit_that_is_too_short_changes_the_states() -> None:
    backbone, inputs = small_backbone("LlamaBackbone"), rows()
    with segment_attention(backbone):
        full = np.asarray(backbone(inputs))
        with chunked_attention(backbone, inputs["padding_mask"], 2, Chunking(4, 1.0)):
            ours = np.asarray(backbone(inputs))
    assert np.abs(ours - full).max() > 1e-3


def test_fewer_products_are_computed() -> None:
    backbone = small_backbone("Gemma3Backbone", sliding_window_size=64, head_dim=64)
    inputs = {name: np.ones((1, 512), np.int32) for name in ("token_ids", "padding_mask")}

    def flops(longest: int, cut: Chunking) -> float:
        def forward(inputs: dict[str, jax.Array]) -> jax.Array:
            with chunked_attention(backbone, inputs["padding_mask"], longest, cut):
                return backbone(inputs)

        return float(jax.jit(forward).lower(inputs).compile().cost_analysis()["flops"])

    full, windows = flops(512, Chunking(512, 1.0)), flops(512, Chunking(64, 2.0))
    assert windows < 0.5 * full  # the sliding windows
    assert flops(128, Chunking(64, 2.0)) < 0.9 * windows  # the global layer too
    assert flops(512, Chunking(64, 16.0)) > 0.95 * full  # chunks would not pay off
