"""An exported model is loaded again and is the same model, or the export fails."""

import json
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

from job.adapters.merge import check_export, write_checkpoint, write_preset
from job.errors import StageError
from tests.model.families import small_backbone

TOKENS = np.arange(1, 41, dtype=np.int32)[None] % 60
SPECIAL = ("<|im_start|>", "<|im_end|>")
SCALING = {
    "rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0, "rope_pretraining_sequence_length": 16,
}  # fmt: skip


def llama(**arguments: object) -> keras_hub.models.Llama3CausalLM:
    keras.utils.set_random_seed(1)
    backbone = small_backbone("Llama3Backbone", layer_norm_epsilon=1e-5, **arguments)
    for variable in backbone.variables:
        if len(variable.shape) > 1:  # as large as a trained model's
            variable.assign(np.random.default_rng(1).normal(0, 0.5, variable.shape))
    return keras_hub.models.Llama3CausalLM(preprocessor=None, backbone=backbone)


def tokenizer() -> keras_hub.models.Llama3Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "a", "b", "ab"])}
    return keras_hub.models.Llama3Tokenizer(
        vocabulary, ["a b"], *SPECIAL, misc_special_tokens=set(SPECIAL)
    )


def logits(task: keras_hub.models.CausalLM) -> np.ndarray:
    return np.asarray(task({"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}))


@pytest.mark.parametrize("tied", [True, False])
def test_a_preset_of_a_llama_loads_as_the_same_model(tmp_path: Path, tied: bool) -> None:
    task = llama(tie_word_embeddings=tied, **SCALING)
    write_preset(task, tokenizer(), tmp_path)
    check_export(task.backbone, tmp_path, "float32")
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype="float32")
    np.testing.assert_array_equal(logits(again), logits(task))
    assert again.backbone.tie_word_embeddings is tied


def test_a_preset_keeps_its_start_and_end_tokens(tmp_path: Path) -> None:
    write_preset(llama(tie_word_embeddings=True), tokenizer(), tmp_path)
    again = keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path))
    assert (again.start_token, again.end_token) == SPECIAL
    assert (again.start_token_id, again.end_token_id) == (0, 1)
    assert list(again("ab<|im_end|>a")) == [4, 1, 2]


def test_an_export_that_is_another_model_fails(tmp_path: Path) -> None:
    task = llama(tie_word_embeddings=True)
    write_preset(task, tokenizer(), tmp_path)
    path = tmp_path / "task.json"
    saved = json.loads(path.read_text())
    saved["config"]["backbone"]["config"]["rope_max_wavelength"] = 300
    path.write_text(json.dumps(saved))
    with pytest.raises(StageError, match="loaded again, has other logits"):
        check_export(task.backbone, tmp_path, "float32")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StageError, match="cannot be loaded again"):
        check_export(task.backbone, tmp_path, "float32")


def test_a_checkpoint_of_a_llama_loads_as_the_same_model(tmp_path: Path) -> None:
    task = llama(tie_word_embeddings=True)
    write_checkpoint(task.backbone, tokenizer(), tmp_path)
    check_export(task.backbone, tmp_path, "float32")
