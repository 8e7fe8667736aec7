"""A checkpoint is loaded with its own numbers, or refused by the key that KerasHub gets wrong."""

import json
import re
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from job.errors import UsageError
from job.model.abstract import make_task
from job.model.load import load_task
from job.spec.schema import Model

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA = {**SIZES, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False}
QWEN = {**LLAMA, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}
GEMMA = {
    **SIZES, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8,
    "sliding_window": 8, "final_logit_softcapping": None, "attn_logit_softcapping": 50.0,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001,
    "output_router_logits": False, "mlp_only_layers": [0],
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": None},
    "mixtral": {
        **LLAMA, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2,
        "output_router_logits": False, "router_aux_loss_coef": 0.001,
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 16},
    "qwen2_moe": {**QWEN, **MOE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**QWEN, **MOE, "head_dim": 8},
    "gemma": {k: v for k, v in GEMMA.items() if not re.search("soft|pre_attn|window", k)},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    "gpt2": {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def config(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, "architectures": ["X"], **CONFIGS[family], **changes}


def load(folder: Path, given: dict[str, Any]) -> keras_hub.models.Backbone:
    (folder / "config.json").write_text(json.dumps(given))
    return load_task(str(folder), "float32", str(folder), load_weights=False).backbone


def layers_with(backbone: keras_hub.models.Backbone, attribute: str) -> list[Any]:
    layers = backbone._flatten_layers()
    return [getattr(layer, attribute) for layer in layers if hasattr(layer, attribute)]


@pytest.mark.parametrize("family", CONFIGS)
def test_each_family_loads_with_its_own_epsilon(tmp_path: Path, family: str) -> None:
    key = "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps"
    backbone = load(tmp_path, config(family, **{key: 0.25}))
    assert set(layers_with(backbone, "epsilon")) == {0.25}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_llama_3_scaling_is_read_in_both_spellings(tmp_path: Path, spelling: str) -> None:
    given = config("llama", **{spelling: {**LLAMA3, "rope_theta": 5e5}})
    backbone = load(tmp_path, given)
    assert backbone.rope_frequency_adjustment_factor == 8.0
    assert backbone.rope_pretraining_sequence_length == 16
    assert set(layers_with(backbone, "frequency_adjustment_factor")) == {8.0}


def test_dropped_arguments_reach_the_backbone(tmp_path: Path) -> None:
    llama = load(tmp_path, config("llama", rms_norm_eps=1e-5))
    assert llama.get_config()["layer_norm_epsilon"] == 1e-5
    linear = {"type": "linear", "factor": 4.0}
    mistral = load(tmp_path, config("mistral", rope_scaling=linear))
    assert set(layers_with(mistral, "scaling_factor")) == {4.0}
    moe = load(tmp_path, config("qwen2_moe", tie_word_embeddings=True))
    assert (moe.token_embedding.tie_weights, moe.mlp_only_layers) == (True, [0])


def test_hub_configuration_of_gemma_3_without_head_size(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "vocab_size": 64}
    scaling = {"rope_type": "linear", "factor": 8.0}
    text = {"model_type": "gemma3_text", **sizes, "rope_scaling": scaling, "sliding_window": 8}
    tower = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "patch_size": 14, "image_size": 56,
    }  # fmt: skip
    given = {"model_type": "gemma3", "architectures": ["X"], "vision_config": tower}
    backbone = load(tmp_path, {**given, "text_config": text, "mm_tokens_per_image": 256})
    assert backbone.head_dim == 256
    with pytest.raises(UsageError, match="foo=2"):
        load(tmp_path, {**given, "text_config": {**text, "foo": 2}})


REFUSED = [
    ("llama", {"foo": 2.0}, "sets foo=2.0, which KerasHub's Llama3Backbone does not use; its ans"),
    ("llama", {"some_switch": True}, "sets some_switch=True"),
    ("llama", {"attention_bias": True}, "attention_bias=True, .* takes as False"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"head_dim": 16}, "head_dim=16, .* takes as 8"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu, .* takes as silu"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type=yarn"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ("llama", {"rope_scaling": {**LLAMA3, "mscale": 2.0}}, "mscale=2.0"),
    ("qwen3", {"rope_scaling": LLAMA3}, "rope_type=llama3"),
    ("mistral", {"tie_word_embeddings": True}, "tie_word_embeddings=True, .* takes as False"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3_moe", {"attention_multiplier": 0.5}, "attention_multiplier=0.5"),
    ("gemma", {"rope_theta": 5e5}, "rope_theta=500000.0, .* takes as 10000.0"),
    ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar=144, .* takes as 8"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types="),
    ("gemma3_text", {"sliding_window_pattern": 2}, "sliding_window_pattern=2, .* takes as 6"),
    ("gemma3_text", {"rope_local_base_freq": 5e5}, "rope_theta=500000.0, .* takes as 10000.0"),
    ("gpt2", {"n_inner": 64}, "n_inner=64, .* takes as 128"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_kerashub_gets_wrong_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, config(family, **changes))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(
        "model.preset: config.json of "
    )


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    given = config("llama")
    del given["rope_theta"]
    with pytest.raises(UsageError, match="its config.json has no 'rope_theta'"):
        load(tmp_path, given)


def test_keys_that_change_no_answer_are_let_through(tmp_path: Path) -> None:
    harmless = {
        "transformers_version": "5.24.0", "dtype": "bfloat16", "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": [1, 2], "initializer_range": 0.02, "use_cache": True,
        "attention_dropout": 0.1, "pretraining_tp": 1, "attention_bias": False, "mlp_bias": False,
        "rope_scaling": None, "head_dim": None, "quantization_config": None, "foo": None,
        "bar": False, "layer_scale": 0, "id2label": {"0": "A"}, "unsloth_fixed": True,
        "max_position_embeddings": 512, "_name_or_path": "x", "some_list": [],
        "is_llama_config": True, "rope_interleaved": False, "_attn_implementation_autoset": True,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "max_length": 4096,
    }  # fmt: skip
    assert load(tmp_path, config("llama", **harmless)).num_layers == 2


def test_a_plan_refuses_what_a_run_would(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="config.json of .hf://a/b. sets foo=2"):
        make_task(Model(preset="hf://a/b"), config("llama", foo=2))


def tensors() -> dict[str, np.ndarray]:
    """A tied Llama of one block."""
    shapes = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48), "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    return {name: np.ones(shape, np.float32) for name, shape in names.items()}


def write(folder: Path, there: dict[str, np.ndarray]) -> None:
    given = config("llama", num_hidden_layers=1, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(given))
    save_file(there, folder / "model.safetensors")


def test_weights_are_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    there = tensors()
    write(tmp_path, there)
    backbone = load_task(str(tmp_path), "float32", "it").backbone
    assert all(np.all(np.asarray(variable) == 1) for variable in backbone.variables)
    del there["model.norm.weight"]
    write(tmp_path, there)
    with pytest.raises(UsageError, match="cannot load 'it' .* model.norm.weight"):
        load_task(str(tmp_path), "float32", "it")
