"""Make a tiny random checkpoint of each family: make_models.py FOLDER VOCABULARY NAME...

A name is a family, or `family+variant` with numbers unlike the family's usual ones. Weights are
exact in 16 bits, since KerasHub rounds some families to that on loading.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as t

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**SHAPE, **HEADS, "head_dim": 16}
GLOBAL_HEAD = 32
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
LENGTH = {"max_position_embeddings": 512}


def configs(vocabulary: int) -> dict[str, t.PreTrainedConfig]:
    sizes = {"vocab_size": vocabulary, **LENGTH}
    six = {**GEMMA, "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return {
        "gemma3": t.Gemma3TextConfig(**sizes, **six),
        "gemma3_one_head": t.Gemma3TextConfig(
            **sizes, **six | {"num_attention_heads": 1, "num_key_value_heads": 1}
        ),
        "gemma": t.GemmaConfig(**sizes, **GEMMA),
        "gemma2": t.Gemma2Config(**sizes, **GEMMA, sliding_window=8, query_pre_attn_scalar=16),
        "llama3": t.LlamaConfig(**sizes, **SHAPE, **HEADS, rope_theta=500000.0),
        "mistral": t.MistralConfig(**sizes, **SHAPE, **HEADS, sliding_window=8),
        "qwen2": t.Qwen2Config(**sizes, **SHAPE, **HEADS),
        "qwen3": t.Qwen3Config(**sizes, **SHAPE, **HEADS, head_dim=16),
        "mixtral": t.MixtralConfig(**sizes, **SHAPE, **HEADS, num_local_experts=4),
        "qwen2_moe": t.Qwen2MoeConfig(
            **sizes, **SHAPE, **HEADS, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24
        ),
        "qwen3_moe": t.Qwen3MoeConfig(
            **sizes, **SHAPE, **HEADS, **EXPERTS, num_experts=4, head_dim=16
        ),
        "smollm3": t.SmolLM3Config(
            **sizes, **SHAPE, **HEADS, no_rope_layers=[1, 0], pad_token_id=0
        ),
        "gpt2": t.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4),
        "gemma4": t.Gemma4TextConfig(
            **sizes,
            **GEMMA | {"num_hidden_layers": 4},
            layer_types=["sliding_attention", "full_attention"] * 2,
            global_head_dim=GLOBAL_HEAD,
            sliding_window=8,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocabulary,
            num_kv_shared_layers=2,
        ),
    }


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "epsilon": {"rms_norm_eps": 0.05, "layer_norm_epsilon": 0.05},
    "theta": {"rope": {"rope_theta": 500.0}},
    "llama3": {"rope": LLAMA3},
    "old_llama3": {"rope": LLAMA3},
    "linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "yarn": {"rope": YARN},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 24},
    "scalar": {"query_pre_attn_scalar": 8},
    "odd_scalar": {"query_pre_attn_scalar": 100},
    "soft_caps": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "windowed": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
    "one_window": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "activation": {
        "hidden_act": "relu",
        "hidden_activation": "relu",
        "activation_function": "relu",
    },
}


def vary(config: t.PreTrainedConfig, variant: str) -> t.PreTrainedConfig:
    """Change a configuration; its RoPE is changed for all layers, or for the global ones."""
    given = config.to_dict()
    given.pop("layer_types" if "window" in variant else "", None)
    for key, value in VARIANTS[variant].items():
        if key == "rope":
            rope = given["rope_parameters"]
            rope.get("full_attention", rope).update(value)
        elif key in given:
            given[key] = value
    return type(config)(**given)


def old_spelling(path: Path) -> None:
    """Spell RoPE as transformers 4 did."""
    given = json.loads(path.read_text())
    rope = given.pop("rope_parameters")
    path.write_text(
        json.dumps(given | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope})
    )


def main(folder: Path, vocabulary: int, names: list[str]) -> None:
    families = configs(vocabulary)
    for name in names:
        family, _, variant = name.partition("+")
        config = vary(families[family], variant) if variant else families[family]
        torch.manual_seed(1)
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                parameter.copy_(parameter.half().float())
        model.save_pretrained(folder / name, max_shard_size="100KB" if name == "gemma3" else "1GB")
        path = folder / name / "config.json"
        if family == "gemma4":  # as on the Hub, the only form that KerasHub reads
            given = json.loads(path.read_text())
            del given["per_layer_config"]
            path.write_text(json.dumps(given | {"global_head_dim": GLOBAL_HEAD}))
        if variant == "old_llama3":
            old_spelling(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
