"""Attention that stays inside each example of a packed row.

KerasHub's decoder blocks make their attention mask from the padding mask in one method.
While a function is traced inside `segment_attention`, that method also looks at segment ids,
which ride in the padding mask: 0 is padding, and tokens see only tokens of their own
segment. Positions need no reset where they are rotary, since those are relative.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

_METHODS = ("_compute_attention_mask", "_compute_self_attention_mask")

PACKABLE = (
    "Gemma3Backbone",
    "GemmaBackbone",
    "LlamaBackbone",
    "Llama3Backbone",
    "MistralBackbone",
    "Qwen3Backbone",
)
"""Backbones for which a test shows that packed and unpacked hidden states agree."""


def can_pack(backbone: Any) -> bool:
    """Whether rows of several examples are sound for this backbone."""
    return type(backbone).__name__ in PACKABLE and len(list(mask_makers(backbone))) > 0


def mask_makers(backbone: Any) -> Iterator[tuple[Any, str]]:
    """The layers that make attention masks, each with the name of the method that does."""
    for layer in backbone._flatten_layers(include_self=False):
        for name in _METHODS:
            if hasattr(type(layer), name):
                yield layer, name


@contextlib.contextmanager
def segment_attention(backbone: Any) -> Iterator[None]:
    """Within this block the backbone reads its padding mask as segment ids."""
    patched = list(mask_makers(backbone))
    for layer, name in patched:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__[name] = _by_segment(getattr(layer, name))
    try:
        yield
    finally:
        for layer, name in patched:
            del layer.__dict__[name]


def _by_segment(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(make_mask)
    key = next(name for name in signature.parameters if name.endswith("padding_mask"))

    def with_segments(*args: Any, **kwargs: Any) -> Any:
        from keras import ops

        bound = signature.bind(*args, **kwargs)
        segments = ops.cast(bound.arguments[key], "int32")
        bound.arguments[key] = ops.cast(segments > 0, "int32")
        mask = make_mask(*bound.args, **bound.kwargs)
        same = ops.equal(segments[:, :, None], segments[:, None, :])
        return ops.logical_and(ops.cast(mask, "bool"), same)

    return with_segments
