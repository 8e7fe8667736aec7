"""The shape of a model from its preset's config.json: layers, kernels, parameters.

No weights are needed. The configurations of common presets are listed here; that of a folder is
read, and that of another Hub repository is downloaded, one small file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from job.chat.text_tokenizer import read_json
from job.errors import UsageError
from job.model.smollm2 import CONFIG as SMOLLM2_CONFIG
from job.spec.fields import SMOLLM2, TINY
from job.spec.pinning import NONE, pinned
from job.spec.schema import Lora, Model

Config = Mapping[str, Any]
"""A preset's config.json, KerasHub's or transformers'."""


@dataclass(frozen=True)
class Linear:
    """A kernel `[front, last]`, where `front` may be several axes."""

    front: int
    last: int
    output: int
    """Output values per token."""

    @property
    def parameters(self) -> int:
        return self.front * self.last

    def adapter(self, rank: int) -> int:
        """Return the parameters of A and B; like Keras, this factors the last axis."""
        return rank * (self.front + self.last)


@dataclass(frozen=True)
class Layer:
    """One decoder block."""

    linears: Mapping[str, Linear]
    """Kernels by KerasHub's layer names."""
    heads: int
    key_value_heads: int
    head_dim: int
    window: int | None
    """Size of the attention window in tokens; None: no window."""
    others: int
    """Parameters outside of kernels, such as norms."""
    experts: int = 0
    """Parameters of a mixture of experts; KerasHub computes all experts for every token."""
    expert_outputs: int = 0
    """Output values per token of the first kernels of all experts."""
    expert_sums: int = 0
    """Output values per token of the last kernels of all experts, before their weighted sum."""

    @property
    def kernels(self) -> int:
        """Parameters that multiply every token."""
        return sum(linear.parameters for linear in self.linears.values()) + self.experts


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model."""

    family: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: Sequence[Layer]

    @property
    def head(self) -> int:
        """Parameters of the head, as many as of the embeddings."""
        return self.hidden * self.vocabulary

    @property
    def kernels(self) -> int:
        """Parameters of all blocks that multiply every token."""
        return sum(layer.kernels for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        blocks = sum(layer.kernels + layer.others for layer in self.layers)
        return blocks + self.head * (1 if self.tied else 2) + self.hidden

    def adapter(self, lora: Lora) -> int:
        """Return the number of trainable parameters.

        Raises:
            UsageError: a target is not a layer of this model.
        """
        names = sorted({name for layer in self.layers for name in layer.linears})
        targets = names if lora.targets == "all-linear" else lora.targets
        for name in targets:
            if name not in names:
                raise UsageError(
                    f"model.lora.targets: no layer is named '{name}'; this model has "
                    f"{', '.join(names)}"
                )
        return sum(
            layer.linears[name].adapter(lora.rank)
            for layer in self.layers
            for name in targets
            if name in layer.linears
        )


def _gemma3(
    layers: int, hidden: int, feed: int, heads: int, keys: int, window: int, **more: Any
) -> Config:
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": feed,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": window, "vocab_size": 262_144, **more,
    }  # fmt: skip


_GEMMA4_26B: Config = {
    "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text",
    "num_hidden_layers": 30, "hidden_size": 2816, "intermediate_size": 2112,
    "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
    "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True,
    "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
    "moe_intermediate_size": 704, "vocab_size": 262_144, "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_theta": 10_000.0},
    },
}  # fmt: skip

_KNOWN: dict[str, tuple[Config, tuple[str, ...]]] = {
    "270m": (_gemma3(18, 640, 2048, 4, 1, 512), ("google/gemma-3-270m", "gemma3_270m")),
    "1b": (_gemma3(26, 1152, 6912, 4, 1, 512), ("google/gemma-3-1b", "gemma3_1b")),
    "4b": (_gemma3(34, 2560, 10_240, 8, 4, 1024), ("google/gemma-3-4b", "gemma3_4b_text")),
    "12b": (_gemma3(48, 3840, 15_360, 16, 8, 1024), ("google/gemma-3-12b", "gemma3_12b_text")),
    "27b": (
        _gemma3(62, 5376, 21_504, 32, 16, 1024, head_dim=128, query_pre_attn_scalar=168),
        ("google/gemma-3-27b", "gemma3_27b_text"),
    ),
    "26b-a4b": (_GEMMA4_26B, ("google/gemma-4-26b-a4b", "gemma4_26b_a4b")),
    "135m": (SMOLLM2_CONFIG, (SMOLLM2, f"huggingfacetb/{SMOLLM2}")),
}
"""Configurations by size; of multimodal models, that of the text part."""


def find_config(model: Model) -> Config:
    """Return the configuration of the spec's preset.

    Raises:
        UsageError: it is not listed here, not a folder and not on the Hub.
        SetupError, StageError: the Hub denies access or cannot be reached.
    """
    preset = model.preset
    if preset == TINY:
        from job.model.tiny import SHAPE, VOCABULARY

        return {
            "module": "keras_hub.src.models.gemma3.gemma3_backbone",
            "class_name": "Gemma3Backbone",
            "registered_name": "keras_hub>Gemma3Backbone",
            "config": {"vocabulary_size": VOCABULARY, **SHAPE},
        }
    if (known := _known(preset)) is not None:
        return known
    if not preset.startswith("hf://") and not Path(preset).is_dir():
        raise UsageError(
            f"model.preset: the shape of {preset!r} is not known without its files; write its "
            "folder, or hf://owner/name"
        )
    folder = _download(model) if preset.startswith("hf://") else Path(preset)
    config = read_json(folder / "config.json")
    if not config:
        raise UsageError(f"model.preset: {preset!r} has no config.json, or an empty one")
    return config


def _download(model: Model) -> Path:
    repository, commit, folder = pinned("model", model.preset, model.revision, NONE, "models")
    files = [file for file in repository.files(commit) if file.path == "config.json"]
    repository.fetch(commit, files, folder)
    return folder


def _known(preset: str) -> Config | None:
    name = preset.removeprefix("hf://").lower().replace("_instruct_", "_")
    for suffix in ("-it", "-pt"):
        name = name.removesuffix(suffix)
    return next((config for config, names in _KNOWN.values() if name in names), None)


_NAMES = {
    "num_layers": "num_hidden_layers", "num_query_heads": "num_attention_heads",
    "hidden_dim": "hidden_size", "intermediate_dim": "intermediate_size",
    "vocabulary_size": "vocab_size", "sliding_window_size": "sliding_window",
    "expert_intermediate_dim": "moe_intermediate_size",
}  # fmt: skip
"""transformers' names of sizes, by KerasHub's where they differ."""


class _Family(NamedTuple):
    """What the sizes in a configuration do not say about a family's blocks."""

    feed_forward: tuple[str, str, str]
    """KerasHub's names of the gate, the other first kernel, and the last one."""
    norms: int
    """Vectors of the model's width in a block."""
    head_norms: int = 0
    """Vectors of a head's width in a block."""
    period: int | None = None
    """One block in so many has no attention window; None: all blocks are alike."""
    head_dim: int | None = None
    """Width of a head unless the configuration says; None: that of the model over all heads."""
    tied: bool = False
    """Whether the head is the embeddings, unless the configuration says."""


_GEMMA3 = _Family(("ffw_gating", "ffw_gating_2", "ffw_linear"), 4, 2, 6, 256, tied=True)
_GEMMA4 = _GEMMA3._replace(norms=8)
_LLAMA = _Family(
    ("feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense"), 2
)
_QWEN3 = _LLAMA._replace(head_norms=2)

_FAMILIES: Mapping[str, _Family] = {
    "Gemma3Backbone": _GEMMA3, "gemma3_text": _GEMMA3, "gemma3": _GEMMA3,
    "Gemma4Backbone": _GEMMA4, "gemma4_text": _GEMMA4, "gemma4": _GEMMA4,
    "Llama3Backbone": _LLAMA, "LlamaBackbone": _LLAMA, "llama": _LLAMA,
    "MistralBackbone": _LLAMA, "mistral": _LLAMA,
    "Qwen3Backbone": _QWEN3, "qwen3": _QWEN3,
}  # fmt: skip


def model_shape(config: Config, preset: str) -> ModelShape:
    """Return the shape that a configuration describes.

    Raises:
        UsageError: its family is not supported here, or it lacks a size.
    """
    name = str(config.get("class_name") or config.get("model_type") or "unknown")
    family = _FAMILIES.get(name)
    if family is None:
        raise UsageError(
            f"model.preset: the shape of {preset!r} ({name}) cannot be derived from its "
            f"configuration; known families are {', '.join(sorted(_FAMILIES))}"
        )
    given = config.get("text_config") or config.get("config") or config
    sizes = {_NAMES.get(key, key): value for key, value in given.items() if value is not None}
    try:
        layers = [_layer(sizes, family, number) for number in range(sizes["num_hidden_layers"])]
        tied = sizes.get("tie_word_embeddings", family.tied)
        return ModelShape(name, sizes["hidden_size"], sizes["vocab_size"], tied, layers)
    except KeyError as error:
        raise UsageError(f"model.preset: the configuration of {preset!r} has no {error}") from None


def _layer(sizes: Config, family: _Family, number: int) -> Layer:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    feed = sizes["intermediate_size"]
    keys = sizes.get("num_key_value_heads", heads)
    head_dim = sizes.get("head_dim", family.head_dim or hidden // heads)
    window = sizes.get("sliding_window")
    shares_keys = False
    if family.period and number % family.period == family.period - 1:
        window, head_dim = None, sizes.get("global_head_dim", head_dim)
        keys = sizes.get("num_global_key_value_heads", keys)
        shares_keys = sizes.get("num_global_key_value_heads") is not None
    gate, up, down = family.feed_forward
    linears = {
        "query": Linear(heads * hidden, head_dim, heads * head_dim),
        "key": Linear(keys * hidden, head_dim, keys * head_dim),
        "value": Linear(keys * hidden, head_dim, keys * head_dim),
        "attention_output": Linear(heads * head_dim, hidden, hidden),
        gate: Linear(hidden, feed, feed),
        up: Linear(hidden, feed, feed),
        down: Linear(feed, hidden, hidden),
    }
    if shares_keys:
        del linears["value"]  # keys are also the values
    others = family.norms * hidden + family.head_norms * head_dim
    if not sizes.get("enable_moe_block", False):
        return Layer(linears, heads, keys, head_dim, window, others)
    count, feed = sizes["num_experts"], sizes["moe_intermediate_size"]
    experts = count * (3 * hidden * feed + hidden + 1)
    sums = count * hidden
    return Layer(linears, heads, keys, head_dim, window, others, experts, 2 * count * feed, sums)
