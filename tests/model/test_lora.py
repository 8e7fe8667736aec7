"""LoRA here is KerasHub's LoRA: same counts, same arithmetic, same file."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
import pytest

from job.adapters.keras_format import load_adapter, save_adapter
from job.errors import StageError, UsageError
from job.model.language_model import LanguageModel
from job.model.lora import LoraLayout, LoraWeights, make_lora_layout
from job.spec.schema import Lora
from tests.model.forward import full_logits


def random_lora(layout: LoraLayout) -> LoraWeights:
    generator = np.random.default_rng(1)
    return tuple(
        (a, jnp.asarray(generator.normal(0, 0.1, b.shape), jnp.float32)) for a, b in layout.init(3)
    )


def logits(model: LanguageModel, weights: tuple) -> np.ndarray:
    return full_logits(model, weights, np.arange(20, 36, dtype=np.int32)[None])


def test_parameter_counts_equal_kerashubs(make_model) -> None:
    model = make_model(preset="tiny", rank=4)
    theirs = keras_hub.models.Backbone.from_preset(model.preset.handle)
    theirs.enable_lora(4)
    assert model.parameters == 550_848
    assert model.lora.parameters == sum(int(np.prod(v.shape)) for v in theirs.trainable_variables)


def test_a_fresh_adapter_changes_nothing(tiny: LanguageModel) -> None:
    start = tiny.lora.init(0)
    assert all(not np.any(b) for _, b in start)
    assert all(np.any(a) for a, _ in start)
    np.testing.assert_array_equal(
        logits(tiny, tiny.merged_weights(tiny.lora, start)), logits(tiny, tiny.weights)
    )


def test_initial_weights_depend_on_the_seed(tiny: LanguageModel) -> None:
    first, again, other = tiny.lora.init(0), tiny.lora.init(0), tiny.lora.init(1)
    np.testing.assert_array_equal(first[0][0], again[0][0])
    assert not np.array_equal(first[0][0], other[0][0])
    assert not np.array_equal(first[0][0], first[2][0])


@pytest.mark.parametrize("alpha", [None, 8.0, 3.0])
def test_kerashub_loads_a_saved_adapter_as_the_same_model(
    make_model, tmp_path: Path, alpha: float | None
) -> None:
    model = make_model(rank=4, alpha=alpha)
    lora = random_lora(model.lora)
    path = tmp_path / "adapter.lora.h5"
    save_adapter(path, model.lora, lora)
    ours = logits(model, model.merged_weights(model.lora, lora))

    task = keras_hub.models.CausalLM.from_preset(
        model.preset.handle, preprocessor=None, dtype="float32"
    )
    task.backbone.load_lora_weights(str(path))
    tokens = np.arange(20, 36, dtype=np.int32)[None]
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    theirs = np.asarray(jax.jit(task)(inputs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not np.allclose(ours, logits(model, model.weights), atol=1e-3)


def test_adapter_read_back_is_the_same_model(make_model, tmp_path: Path) -> None:
    model = make_model(rank=4, alpha=8.0)
    lora = random_lora(model.lora)
    save_adapter(tmp_path / "a.lora.h5", model.lora, lora)
    layout, back = load_adapter(tmp_path / "a.lora.h5", model.lora)
    assert layout.scale == 1.0
    np.testing.assert_allclose(
        logits(model, model.merged_weights(layout, back)),
        logits(model, model.merged_weights(model.lora, lora)),
        atol=1e-6,
    )


def test_same_weights_give_the_same_bytes(tiny: LanguageModel, tmp_path: Path) -> None:
    lora = random_lora(tiny.lora)
    for name in ("a", "b"):
        save_adapter(tmp_path / f"{name}.lora.h5", tiny.lora, lora)
    assert (tmp_path / "a.lora.h5").read_bytes() == (tmp_path / "b.lora.h5").read_bytes()


def test_a_truncated_file_or_another_rank_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "a.lora.h5"
    save_adapter(path, tiny.lora, random_lora(tiny.lora))
    with pytest.raises(StageError, match="rank 4, but model.lora.rank is 8"):
        load_adapter(path, replace(tiny.lora, rank=8))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(StageError, match="not a LoRA file"):
        load_adapter(path, tiny.lora)


def test_an_unknown_target_lists_the_layers(tiny: LanguageModel) -> None:
    with pytest.raises(UsageError, match="no layer is named 'q_proj'.*ffw_gating.*query"):
        make_lora_layout(tiny.backbone, Lora(targets=["q_proj"]))


@pytest.mark.slow
def test_gemma_3_1b_has_the_published_parameter_counts() -> None:
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=262_144,
        image_size=0,
        num_layers=26,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=1152,
        intermediate_dim=6912,
        head_dim=256,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=512,
        dtype="bfloat16",
    )
    assert backbone.count_params() == 999_885_952
    assert make_lora_layout(backbone, Lora(rank=16)).parameters == 2_609_152


def test_all_linear_adapts_every_matrix_of_every_block(make_model) -> None:
    layout = make_lora_layout(
        make_model(preset="tiny").backbone, Lora(rank=4, targets="all-linear")
    )
    names = [target.path.rsplit("/", 1)[-1] for target in layout.targets]
    assert sorted(set(names)) == [
        "attention_output", "ffw_gating", "ffw_gating_2", "ffw_linear", "key", "query", "value",
    ]  # fmt: skip
    assert len(names) == 7 * 6
    assert all(target.equations is not None for target in layout.targets)


def test_the_file_preserves_the_rslora_scale(make_model, tmp_path: Path) -> None:
    layout = make_lora_layout(make_model().backbone, Lora(rank=4, alpha=8, rslora=True))
    assert layout.scale == 4.0
    lora = random_lora(layout)
    save_adapter(tmp_path / "a.lora.h5", layout, lora)
    back, weights = load_adapter(tmp_path / "a.lora.h5", layout)
    assert back.scale == 1.0
    np.testing.assert_allclose(weights[0][1], 4.0 * lora[0][1])
