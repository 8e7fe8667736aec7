"""The `tiny` preset: a small Gemma 3 with random weights, the same on every machine.

With it a complete job runs in seconds and offline, through the code that loads a real model: it
is saved as an ordinary KerasHub preset folder and loaded from there. Its answers mean nothing.
"""

import hashlib
import io
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from job.storage.locations import build_once, cache_folder

VERSION = 1
"""Increment when the preset is built differently."""

VOCABULARY = 2048
SEED = 20250301

SHAPE: dict[str, Any] = {
    "image_size": 0,
    "num_layers": 6,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 64,
    "intermediate_dim": 256,
    "head_dim": 32,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 64,
    "vision_encoder": None,
}
"""Gemma 3's layer pattern: five sliding-window layers, then a global one."""


def tiny_preset() -> Path:
    """Return the preset's folder, built in the cache on first use.

    Raises:
        SetupError: the cache cannot be written.
    """
    key = hashlib.sha256(
        repr((VERSION, VOCABULARY, SEED, SHAPE, version("keras"), version("keras-hub"))).encode()
        + _corpus().encode()
    ).hexdigest()[:16]
    return build_once(cache_folder("presets", f"tiny-{key}"), build_preset)


def _corpus() -> str:
    return (resources.files("job") / "samples" / "dialogues.jsonl").read_text("utf-8")


def build_preset(folder: Path, shape: Mapping[str, Any] = SHAPE) -> None:
    """Build a random Gemma 3 of a shape, with the samples' tokenizer, in an empty folder."""
    import keras
    import keras_hub

    tokenizer = keras_hub.tokenizers.Gemma3Tokenizer(
        proto=train_tokenizer(), has_vision_tokens=False
    )
    keras.utils.set_random_seed(SEED)
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(), dtype="float32", **shape
    )
    size = backbone.token_embedding.embeddings.shape
    # Keras' initializer would give the tied head logits too small to learn from.
    embeddings = np.random.default_rng(SEED).normal(0, shape["hidden_dim"] ** -0.5, size)
    backbone.token_embedding.embeddings.assign(embeddings)
    keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone).save_to_preset(
        str(folder)
    )
    tokenizer.save_to_preset(str(folder))


def train_tokenizer() -> bytes:
    """Train a SentencePiece model on the samples, with Gemma's control tokens and settings."""
    import json

    import sentencepiece

    rows = [json.loads(line) for line in _corpus().splitlines()]
    texts = [row[key] for row in rows for key in ("input", "output")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n"],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
