"""Batched decoding gives what KerasHub's own `generate` gives for one prompt at a time."""

import jax
import jax.numpy as jnp
import keras_hub
import numpy as np
import pytest
from jax.sharding import Mesh

from job.model.generation import left_pad
from job.model.language_model import LanguageModel, Preset
from job.model.tiny import train_tokenizer
from job.spec.schema import Lora, Model
from tests.conversations import chat_tokenizer
from tests.model.families import BY_FAMILY, small_backbone

LENGTHS = (3, 12)  # the window of the small models is 5
NEW = 7


def small_model(family: str) -> LanguageModel:
    tokenizer = keras_hub.tokenizers.Gemma3Tokenizer(train_tokenizer(), has_vision_tokens=False)
    size = tokenizer.vocabulary_size()
    kind = getattr(keras_hub.models, family.replace("Backbone", "CausalLM"))
    task = kind(preprocessor=None, backbone=small_backbone(family, vocabulary_size=size))
    spec = Model(preset="test", dtype="float32", lora=Lora(targets="all-linear"))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    return LanguageModel(task, chat_tokenizer(tokenizer), spec, Preset("test", None), mesh)


@pytest.mark.parametrize("family", BY_FAMILY)
def test_every_family_decodes_as_kerashub_does(family: str) -> None:
    model = small_model(family)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 60, size=length) for length in LENGTHS]
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array(LENGTHS, np.int32)
    stops = (1, 106)

    answer = jax.jit(model.generate, static_argnums=(3, 4))
    together = np.asarray(answer(model.weights, tokens, lengths, NEW, stops))
    alone = jax.jit(model.generate_with_kerashub, static_argnums=(3, 4))
    for row in range(len(prompts)):
        one = slice(row, row + 1)
        answered = alone(model.weights, tokens[one], lengths[one], NEW, stops)
        expected = np.asarray(answered)[0].tolist()
        ends = [index for index, token in enumerate(expected) if token in stops]
        end = ends[0] + 1 if ends else NEW
        assert together[row].tolist()[:end] == expected[:end]


def test_decoding_ends_when_every_row_has_stopped() -> None:
    model = small_model("GemmaBackbone")
    tokens = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32)
    lengths = np.array([4, 2], np.int32)
    answer = jax.jit(model.generate, static_argnums=3)
    free = np.asarray(answer(model.weights, tokens, lengths, 12, np.array([1, 1])))
    stops = (int(free[0, 2]), int(free[1, 3]))
    ended = np.asarray(answer(model.weights, tokens, lengths, 12, np.array(stops)))
    turns = max(row.tolist().index(next(t for t in row if t in stops)) for row in ended)
    assert turns <= 3
    assert not ended[:, turns + 1 :].any()


def test_prompts_move_to_the_end_of_their_rows() -> None:
    tokens = jnp.array([[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]])
    aligned = np.asarray(left_pad(tokens, jnp.array([2, 4, 1])))
    assert aligned[0, 2:].tolist() == [1, 2]
    assert aligned[1].tolist() == [3, 4, 5, 6]
    assert aligned[2, 3] == 7
