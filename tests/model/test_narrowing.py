"""A narrowed last block gives the hidden states and gradients of the full one."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from job.model.attention import segment_attention
from job.model.families import FAMILIES, family_of
from job.model.narrowing import gather_positions, narrow_last_block
from tests.model.families import small_backbone

POSITIONS = jnp.array([[3, 14, 0, 23], [5, 5, 12, 22]])
POST_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        pytest.param(  # as in all of its presets
            "Gemma3Backbone", POST_NORMS, marks=pytest.mark.slow
        ),
        ("LlamaBackbone", {}),
        pytest.param("GemmaBackbone", POST_NORMS, marks=pytest.mark.slow),
        *(
            pytest.param(family, {}, marks=pytest.mark.slow)
            for family in FAMILIES
            if family != "LlamaBackbone"
        ),
    ],
)
def test_narrowed_states_and_gradients_equal_the_full_ones(
    family: str, arguments: dict[str, object]
) -> None:
    backbone = small_backbone(family, **arguments)
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 64, size=(4, 12)).astype(np.int32)
    segment_ids = np.repeat([[1, 1, 2, 2]], 3, axis=1).repeat(4, axis=0).astype(np.int32)
    cotangent = jnp.asarray(generator.normal(size=(2, 4, 16)), jnp.float32)

    def states(weights: list[jax.Array], *, narrow: bool) -> jax.Array:
        scope = keras.StatelessScope(
            state_mapping=list(zip(backbone.variables, weights, strict=True))
        )
        inputs = {"token_ids": tokens, "padding_mask": segment_ids}
        with scope, segment_attention(backbone):
            if not narrow:
                return gather_positions(backbone(inputs), POSITIONS)
            with narrow_last_block(backbone, POSITIONS):
                return backbone(inputs)

    def both(narrow: bool) -> tuple[jax.Array, list[jax.Array]]:
        weights = [variable.value for variable in backbone.variables]
        outputs, pull = jax.vjp(lambda w: states(w, narrow=narrow), weights)
        return outputs, pull(cotangent)[0]

    (full, gradients), (ours, our_gradients) = both(narrow=False), both(narrow=True)
    np.testing.assert_allclose(ours, full, atol=1e-5)
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))


def test_a_subclass_may_differ_and_is_not_listed() -> None:
    other = small_backbone("LlamaBackbone")
    other.__class__ = type("OtherBackbone", (type(other),), {})
    assert family_of(other) is None


def test_only_positions_with_a_loss_are_gathered() -> None:
    hidden = jnp.arange(24.0).reshape(1, 8, 3)
    picked = gather_positions(hidden, jnp.array([[6, 2]]))
    np.testing.assert_array_equal(picked[0], hidden[0, np.array([6, 2])])
    parts = gather_positions(hidden.reshape(4, 2, 3), jnp.array([[3], [0]]))
    np.testing.assert_array_equal(parts[:, 0], hidden[0, np.array([3, 4])])
