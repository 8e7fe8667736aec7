"""Model families for which tests show that optimizations are exact: the table to extend.

KerasHub's families differ in where their blocks add the residual and how they build attention
masks. Any KerasHub causal LM can be trained and evaluated; one whose family is not listed gets one
example per row, full attention and one compiled program per step.

To add a family, give it a line in `FAMILIES` and a small backbone in `tests/model/families.py`.
The tests that take every family of the table must then pass:

- Packed and unpacked hidden states agree (`tests/model/test_language_model.py`), and batched
  decoding gives KerasHub's own text (`tests/model/test_generation.py`).
- Attention in chunks agrees with full attention (`tests/model/test_local_attention.py`).
- States and gradients of a narrowed last block agree (`tests/model/test_narrowing.py`).
- The block-wise step equals the step in one program (`tests/train/test_blockwise_step.py`).

Exporting to transformers and PEFT needs no entry here; `tests/model/test_families.py` tests it.
"""

from types import MappingProxyType
from typing import Any, NamedTuple


class Family(NamedTuple):
    """The feed-forward half of a block that computes `h + last(...first(h))` after its attention.

    The blocks of a listed family see only hidden states and a mask.
    """

    first: str
    """Attribute name of the half's first layer."""
    last: tuple[str, ...]
    """Attribute names of its last layer; the first one that a block has."""


_GEMMA = Family("pre_ffw_norm", ("post_ffw_norm", "ffw_linear"))
_LLAMA = Family("_feedforward_layernorm", ("_feedforward_output_dense",))

FAMILIES = MappingProxyType({
    "Gemma3Backbone": _GEMMA,
    "GemmaBackbone": _GEMMA,
    "LlamaBackbone": _LLAMA,
    "Llama3Backbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "Qwen3Backbone": _LLAMA,
})  # fmt: skip
"""The families by the class name of the KerasHub backbone."""


def family_of(backbone: Any) -> Family | None:
    """Return the family of a KerasHub backbone, or None if it is not listed.

    Subclasses of a listed class do not count: they may override what the tests rely on.
    """
    return FAMILIES.get(type(backbone).__name__)
