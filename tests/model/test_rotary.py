"""Fast rotary embeddings are KerasHub's own, to the bit."""

import numpy as np
import pytest

from job.model.rotary import fast_rotary, rotary_layers
from tests.model.families import small_backbone


@pytest.mark.parametrize(
    ("family", "dtype"), [("Gemma3Backbone", "bfloat16"), ("LlamaBackbone", "float32")]
)
def test_hidden_states_are_the_same_to_the_bit(family: str, dtype: str) -> None:
    backbone = small_backbone(family, dtype=dtype)
    generator = np.random.default_rng(0)
    inputs = {
        "token_ids": generator.integers(1, 64, size=(2, 40)).astype(np.int32),
        "padding_mask": np.ones((2, 40), np.int32),
    }
    calls = []
    before = np.asarray(backbone(inputs), np.float32)
    with fast_rotary(backbone):
        for layer in rotary_layers(backbone):
            rotate = vars(layer)["_apply_rotary_pos_emb"]

            def counted(*args: object, rotate: object = rotate) -> object:
                calls.append(rotate)
                return rotate(*args)

            layer.__dict__["_apply_rotary_pos_emb"] = counted
        after = np.asarray(backbone(inputs), np.float32)
    np.testing.assert_array_equal(after, before)
    assert calls
    assert not any("_apply_rotary_pos_emb" in layer.__dict__ for layer in rotary_layers(backbone))
