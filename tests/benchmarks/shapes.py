"""The models of the benchmarks: random Gemma 3 in two shapes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.model.language_model import LanguageModel

SHAPES: dict[str, dict[str, Any]] = {
    "proxy": {
        "vocabulary_size": 32_768, "num_layers": 6, "hidden_dim": 512, "intermediate_dim": 3072,
        "num_query_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
    },
    "1b": {
        "vocabulary_size": 262_144, "num_layers": 26, "hidden_dim": 1152,
        "intermediate_dim": 6912, "num_query_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    },
}  # fmt: skip


def make_task(shape: str, dtype: str) -> Any:
    """Return a seeded random Gemma 3 of a shape."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Gemma3Backbone(
        **SHAPES[shape], image_size=0, use_post_ffw_norm=True, use_post_attention_norm=True,
        use_sliding_window_attention=True, sliding_window_size=512, dtype=dtype,
    )  # fmt: skip
    return keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)


def make_model(shape: str, dtype: str, rank: int = 16) -> "LanguageModel":
    """Return the model of `make_task` as a `LanguageModel`, with LoRA on query and value.

    It is on one device. Its tokenizer is that of the `tiny` preset, with a smaller vocabulary.
    """
    import jax
    import keras_hub
    import numpy as np
    from jax.sharding import Mesh

    from job.model.language_model import LanguageModel, Preset
    from job.model.tiny import train_tokenizer
    from job.spec.schema import Lora, Model
    from tests.conversations import chat_tokenizer

    tokenizer = keras_hub.tokenizers.Gemma3Tokenizer(train_tokenizer(), has_vision_tokens=False)
    spec = Model(preset="benchmark", dtype=dtype, lora=Lora(rank=rank))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    preset = Preset("benchmark", None)
    return LanguageModel(make_task(shape, dtype), chat_tokenizer(tokenizer), spec, preset, mesh)
