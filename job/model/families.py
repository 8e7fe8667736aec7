"""Capabilities of model families: the table to extend for a new one.

KerasHub's families differ in where their blocks add the residual and how they build attention
masks. A capability is listed here only where a test shows that it leaves the numbers as they
were. Any KerasHub causal LM can be trained and evaluated; a family that is not listed gets one
example per row, full attention and one compiled program per step.

To add a family, give it a line in `FAMILIES` and a small backbone in `tests/model/families.py`.
The tests that take every family of the table must then pass:

- `packable`: packed and unpacked hidden states agree (`tests/model/test_language_model.py`), and
  batched decoding gives KerasHub's own text (`tests/model/test_generation.py`).
- `chunked_attention`: chunks agree with full attention (`tests/model/test_local_attention.py`).
- `feed_forward`: states and gradients of a narrowed last block agree
  (`tests/model/test_narrowing.py`).
- `blockwise`: the block-wise step equals the step in one program
  (`tests/train/test_blockwise_step.py`).

Exporting to transformers and PEFT needs no entry here; `tests/model/test_families.py` tests it.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward half of a block that computes `h + last(...first(h))` after its attention.

    Attributes:
        first: attribute name of the half's first layer.
        last: attribute names of its last layer; the first one that a block has.
    """

    first: str
    last: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Optimizations that tests have shown to be exact.

    Attributes:
        packable: several examples may share a row, each attending only to itself; prompts may be
            left-padded for batched decoding.
        chunked_attention: attention may skip keys beyond the longest example or the window.
        blockwise: each block sees only hidden states and a mask, so blocks can be compiled apart.
        feed_forward: the half of the last block to run only where there is a loss; None if the
            block has another form.
    """

    packable: bool = False
    chunked_attention: bool = False
    blockwise: bool = False
    feed_forward: FeedForward | None = None


_GEMMA = Family(True, True, True, FeedForward("pre_ffw_norm", ("post_ffw_norm", "ffw_linear")))
_LLAMA = Family(
    True, True, True, FeedForward("_feedforward_layernorm", ("_feedforward_output_dense",))
)

FAMILIES = MappingProxyType({
    "Gemma3Backbone": _GEMMA,
    "GemmaBackbone": _GEMMA,
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "Qwen3Backbone": _LLAMA,
})  # fmt: skip
"""Capabilities by the class name of the KerasHub backbone."""


def family_of(backbone: Any) -> Family:
    """Return the capabilities of a KerasHub backbone; none for a family that is not listed.

    Subclasses of a listed class do not count: they may override what the tests rely on.
    """
    return FAMILIES.get(type(backbone).__name__, Family())
