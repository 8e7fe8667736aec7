"""Make a tiny random checkpoint of each family: make_models.py FOLDER VOCABULARY NAME...

Weights are exact in 16 bits, since KerasHub rounds some families to that on loading.
"""

import json
import sys
from pathlib import Path

import torch
import transformers as t

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {**SHAPE, **HEADS, "head_dim": 16}
GLOBAL_HEAD = 32
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
        # KerasHub's norms of queries and keys have this epsilon, whatever the checkpoint says.
        "qwen3": t.Qwen3Config(**sizes, **SHAPE, **HEADS, head_dim=16, rms_norm_eps=1e-5),
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


def main(folder: Path, vocabulary: int, names: list[str]) -> None:
    for name, config in configs(vocabulary).items():
        if name not in names:
            continue
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
    if "gemma4" not in names:
        return
    # As in Gemma 4's checkpoints on the Hub, the only form that KerasHub reads.
    path = folder / "gemma4/config.json"
    config = json.loads(path.read_text())
    del config["per_layer_config"]
    path.write_text(json.dumps(config | {"global_head_dim": GLOBAL_HEAD}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
