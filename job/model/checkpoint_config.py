"""Load a transformers checkpoint into its KerasHub backbone; refuse what KerasHub gets wrong.

KerasHub's converters drop the keys of config.json that they do not know. Here dropped keys are
passed on where the backbone has an argument for them. Then every key is compared with the
backbone; one that it does not use, or takes as another value, is refused by name.
"""

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

from job.errors import UsageError

Config = dict[str, Any]
_FULL, _SLIDING = "full_attention", "sliding_attention"

_NAMES = {
    "vocab_size": "vocabulary_size", "hidden_size": "hidden_dim", "n_embd": "hidden_dim",
    "num_hidden_layers": "num_layers", "n_layer": "num_layers", "n_head": "num_heads",
    "num_attention_heads": "num_query_heads", "n_positions": "max_sequence_length",
    "n_inner": "intermediate_dim", "no_rope_layers": "rope_layer_enabled_list",
    "shared_expert_intermediate_size": "shared_expert_intermediate_dim",
    "num_local_experts": "num_experts", "num_experts_per_tok": "top_k",
    "top_k_experts": "num_experts_per_token", "norm_topk_prob": "norm_top_k_prob",
    "rms_norm_eps": "layer_norm_epsilon", "sliding_window": "sliding_window_size",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
}  # fmt: skip
"""KerasHub's names of keys, where they are not transformers'."""

_HARMLESS = re.compile(
    r"architectures|auto_map|dtype|.*_token_(ids?|index)|.*dropout|.*_pdrop|summary_.*|.*_interval"
    r"|initializer_(range|factor)|(original_)?max_position_embeddings|max_sequence_length|n_ctx"
    r"|max_window_layers|pretraining_tp|output_.*|use_cache|mtp_.*|mrope_.*|id2label|label2id"
    r"|router_(aux_loss_coef|jitter_noise)|_?num_labels|task_specific_params|unsloth_.*|max_length"
    r"|_attn_implementation.*|is_llama_config|transformers\.js_config|do_sample|temperature|top_[kp]"
    r"|(low|high)_freq_factor|rope_(theta|scaling|parameters|local_base_freq)|layer_norm_epsilon"
    r"|moe_intermediate_size|attention_k_eq_v|attn_output_gate"
)
"""Keys that change no logits, as those of training and sampling, or that always take effect."""


def load_backbone(loader: Any, name: str, dtype: str, *, load_weights: bool) -> Any:
    """Make the backbone of KerasHub's loader of a transformers checkpoint called `name`.

    Raises:
        UsageError: it would not compute what the checkpoint's makers computed.
    """
    from keras_hub.src.utils.preset_utils import jax_memory_cleanup
    from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader

    family, config = loader.check_backbone_class(), _normalized(loader.config)
    text, known = config.get("text_config", config), signature(family).parameters
    arguments = loader.converter.convert_backbone_config(config)
    for key, value in text.items():
        argument = key if key in known else _NAMES.get(key)
        if argument in known and value is not None and not _HARMLESS.fullmatch(key):
            arguments.setdefault(argument, value)
    backbone = family(**{**arguments, "dtype": dtype})
    forgotten = {  # by the blocks, which do not pass them to all of their layers
        "epsilon": getattr(backbone, "layer_norm_epsilon", text.get("layer_norm_epsilon", 1e-5)),
        "query_head_dim_normalize": getattr(backbone, "query_head_dim_normalize", True),
    }
    for part in (*backbone.transformer_layers, backbone.layers[-1]):  # the last is a norm
        for layer in part._flatten_layers():
            for attribute in forgotten.keys() & vars(layer).keys():
                setattr(layer, attribute, forgotten[attribute])
    for key, value, actual in _differences(text, backbone):
        does = "does not use" if actual is None else f"takes as {actual!s:.80}"
        raise UsageError(
            f"model.preset: config.json of {name!r} sets {key}={value!s:.80}, which KerasHub's "
            f"{family.__name__} {does}; its answers would be wrong"
        )
    if load_weights:
        jax_memory_cleanup(backbone)
        with SafetensorLoader(loader.preset) as tensors:
            loader.converter.convert_weights(backbone, tensors, config)
    return backbone


def _normalized(config: Config) -> Config:
    """Return the configuration as KerasHub's converters read it."""
    config = dict(config)
    if "text_config" in config:
        outer = config.keys() & {"tie_word_embeddings", "quantization_config"}
        text = config["text_config"] | {key: config[key] for key in outer}
        return config | {"text_config": _normalized(text)}
    if config.get("model_type", "").startswith("gemma"):
        config.setdefault("head_dim", 256)  # transformers' default, which the Hub's files omit
        if config.get("hidden_act") == "gelu":
            config["hidden_act"] = "gelu_pytorch_tanh"  # what the Hub's files mean
    config.setdefault("num_experts", config.get("num_local_experts"))
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = None
    if len(ropes := _ropes(config)) == 1:
        config["rope_parameters"] = rope = ropes[_FULL]
        config["rope_scaling"] = rope if rope["rope_type"] == "llama3" else None
        if rope["rope_type"] == "linear":
            config["rope_scaling_factor"] = rope["factor"]
    return config


def _ropes(text: Config) -> dict[str, Config]:
    """Return RoPE's parameters by type of layer, or under `full_attention` for all layers."""
    given = text.get("rope_parameters") or {}
    if _FULL not in given:
        scaling = text.get("rope_scaling") or {}
        given = {_FULL: {"rope_theta": text.get("rope_theta"), **scaling, **given}}
        if text.get("model_type", "").startswith("gemma3"):
            given[_SLIDING] = {"rope_theta": text.get("rope_local_base_freq", 10_000.0)}
    ropes = {kind: {"rope_type": rope.get("type"), **rope} for kind, rope in given.items()}
    for rope in ropes.values():
        if rope["rope_type"] in (None, "proportional") or rope.get("factor") == 1.0:
            rope["rope_type"] = "default"
    return ropes


def _differences(text: Config, backbone: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys that differ, with config.json's value and the backbone's (None: unused)."""
    numbers, ropes = _numbers(backbone), _ropes(text)
    compared = [(text, numbers)]
    for block, kind in zip(backbone.transformer_layers, numbers["layer_types"], strict=True):
        for layer in block._flatten_layers():
            if type(layer).__name__.endswith("RotaryEmbedding"):
                compared.insert(0, (ropes.get(kind, ropes[_FULL]), _rope_numbers(layer, backbone)))
    for given, has in compared:
        for key, value in given.items():
            if (actual := has.get(key)) is not None:
                differs = value is not None and value != actual
            else:  # a remark, or a feature that KerasHub does not have
                differs = value and not isinstance(value, str) and not _HARMLESS.fullmatch(key)
            if differs:
                yield key, value, actual


def _rope_numbers(layer: Any, backbone: Any) -> Config:
    """Return what a rotary embedding computes with, under transformers' names."""
    llama3 = getattr(layer, "frequency_adjustment_factor", None)
    factor = llama3 or getattr(layer, "scaling_factor", 1.0)
    partial = getattr(backbone, "global_rope_partial_rotary_factor", None)
    return {
        "rope_type": "llama3" if llama3 else "default" if factor == 1.0 else layer.rope_type,
        "rope_theta": getattr(layer, "max_wavelength", None) or layer.rope_theta,
        "factor": factor,
        "partial_rotary_factor": getattr(backbone, "partial_rotary_factor", partial) or 1.0,
    }


def _numbers(backbone: Any) -> Config:
    """Return what a backbone computes with, under transformers' names."""
    blocks, family = backbone.transformer_layers, type(backbone).__name__
    names = _NAMES | {name: name for name in signature(type(backbone)).parameters}
    known = {key: name for key, name in names.items() if not _HARMLESS.fullmatch(key)}
    numbers: Config = {key: getattr(backbone, name, None) for key, name in known.items()}
    if "linear_attention" not in (numbers.get("layer_types") or ()):
        windows = [
            getattr(block, "use_sliding_window_attention", True)
            and getattr(block, "sliding_window_size", getattr(block, "sliding_window", None))
            for block in blocks
        ]
        numbers["layer_types"] = [_SLIDING if window else _FULL for window in windows]
    width = backbone.hidden_dim // (numbers["num_attention_heads"] or numbers["n_head"])
    bias = any("att" in v.path and v.path.endswith("/bias") for b in blocks for v in b.variables)
    activation = "gelu_pytorch_tanh" if family.startswith("Gemma") else "silu"
    return numbers | {
        "hidden_act": activation, "hidden_activation": activation, "attention_bias": bias,
        "activation_function": "gelu_new", "scale_attn_weights": True, "qkv_bias": bias,
        "use_sliding_window": False, "sliding_window_pattern": 6, "_sliding_window_pattern": 6,
        "intermediate_size": backbone.intermediate_dim // (1 + (family == "GemmaBackbone")),
        "head_dim": (head_dim := numbers.get("head_dim") or width),
        "query_pre_attn_scalar": head_dim if numbers.get("query_head_dim_normalize") else width,
        "tie_word_embeddings": backbone.token_embedding.tie_weights,
    }  # fmt: skip
