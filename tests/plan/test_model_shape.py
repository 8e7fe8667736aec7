"""Parameters from a configuration alone are those of the model that KerasHub makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.plan.model_shape import find_config, model_shape
from job.spec.schema import Lora, Model


def shape_of(preset: str) -> Any:
    return model_shape(find_config(Model(preset=preset)), preset)


@pytest.mark.parametrize(
    ("preset", "parameters", "trainable"),
    [
        ("hf://google/gemma-3-1b-it", 999_885_952, 2_609_152),
        ("gemma3_instruct_1b", 999_885_952, 2_609_152),
        ("hf://google/gemma-3-270m", 268_098_176, 1_069_056),
        ("hf://google/gemma-3-4b-it", 3_880_099_328, 16_990_208),
    ],
)
def test_shipped_presets_are_known_offline(preset: str, parameters: int, trainable: int) -> None:
    shape = shape_of(preset)
    assert shape.parameters == parameters
    assert shape.adapter(Lora(rank=16)) == trainable


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
def test_the_tiny_preset_has_the_parameters_that_its_model_has(
    targets: Any, make_model: Any
) -> None:
    names = [
        "query",
        "key",
        "value",
        "attention_output",
        "ffw_gating",
        "ffw_gating_2",
        "ffw_linear",
    ]
    model = make_model(preset="tiny", targets=tuple(names if targets == "all-linear" else targets))
    shape = shape_of("tiny")
    assert shape.parameters == model.parameters
    assert shape.adapter(Lora(rank=4, targets=targets)) == model.lora.parameters


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                "tie_word_embeddings": False, "max_position_embeddings": 64,
                "architectures": ["LlamaForCausalLM"],
            },
            "llama",
        ),
        (
            {
                "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                "tie_word_embeddings": True, "use_sliding_window": False,
                "sliding_window": None, "architectures": ["Qwen3ForCausalLM"],
            },
            "qwen3",
        ),
    ],
    ids=["llama", "qwen3"],
)  # fmt: skip
def test_a_folder_is_read_and_counted_as_keras_hub_counts_it(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from job.model.abstract import abstract_model

    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Model(preset=str(tmp_path), lora=Lora(targets=["query", "attention_output"]))
    found = find_config(model)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    made = abstract_model(model, found, mesh)
    shape = model_shape(found, model.preset)
    assert shape.family == name
    assert shape.parameters == made.parameters
    assert shape.adapter(model.lora) == made.lora.parameters


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "bert"}', ["bert", "known families are", "qwen3"]),
        ('{"model_type": "llama", "hidden_size": 64}', ["has no 'num_hidden_layers'"]),
        ("[]", ["is not a JSON object"]),
        ("{", ["config.json is not JSON"]),
        ("{}", ["has no config.json, or an empty one"]),
    ],
)
def test_an_incomplete_configuration_is_refused(
    content: str, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        shape_of(str(tmp_path))
    for words in (*said, "model.preset"):
        assert words in str(caught.value)


def test_an_unknown_name_and_an_unknown_target_say_the_way_out() -> None:
    with pytest.raises(UsageError, match="write its folder, or hf://owner/name"):
        find_config(Model(preset="some_preset"))
    with pytest.raises(
        UsageError, match="no layer is named 'querry'; this model has attention_out"
    ):
        shape_of("tiny").adapter(Lora(targets=["querry"]))


def test_the_plan_counts_a_mixture_of_experts() -> None:
    from job.model.abstract import make_task

    model = Model(preset="gemma4_instruct_26b_a4b")
    config = find_config(model)
    config = {**config, "num_hidden_layers": 6, "layer_types": config["layer_types"][:6]}
    backbone = make_task(model, config).backbone
    shape = model_shape(config, model.preset)
    assert backbone.count_params() == pytest.approx(shape.parameters, rel=1e-6)
