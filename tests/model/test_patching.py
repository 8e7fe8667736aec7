"""Patches last for their block and leave everything as it was."""

import pytest

from job.model.attention import segment_attention
from job.model.narrowing import narrow_last_block
from job.model.patching import Patch, patched
from tests.model.families import small_backbone


class Layer:
    """A layer with a method and an attribute of its own."""

    def __init__(self) -> None:
        self.width = 3

    def call(self) -> str:
        return "class"


def test_methods_and_attributes_are_restored() -> None:
    layer = Layer()
    with patched([Patch(layer, "call", lambda: "patched"), Patch(layer, "width", 5)]):
        assert (layer.call(), layer.width) == ("patched", 5)
    assert (layer.call(), layer.width) == ("class", 3)
    assert vars(layer) == {"width": 3}


def test_a_second_patch_gives_way_to_the_first() -> None:
    layer = Layer()
    with patched([Patch(layer, "call", lambda: "outer")]):
        with patched([Patch(layer, "call", lambda: "inner")]):
            assert layer.call() == "inner"
        assert layer.call() == "outer"
    assert layer.call() == "class"


def test_a_class_is_patched_and_restored_after_an_error() -> None:
    original = vars(Layer)["call"]
    with pytest.raises(ValueError, match="tracing"), patched([Patch(Layer, "call", lambda _: "x")]):
        assert Layer().call() == "x"
        raise ValueError("tracing failed")
    assert vars(Layer)["call"] is original


def test_keras_layers_have_no_attributes_left() -> None:
    backbone = small_backbone("Gemma3Backbone")
    layers = backbone._flatten_layers()
    before = [set(vars(layer)) for layer in layers]
    with segment_attention(backbone), narrow_last_block(backbone, [[0]]):
        assert [set(vars(layer)) for layer in layers] != before
    assert [set(vars(layer)) for layer in layers] == before
