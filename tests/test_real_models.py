"""The real models and tokenizers that other tests use are those of their makers."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - lets safetensors read bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from tests.conftest import MakeModel
from tests.model.forward import full_logits
from tests.peers import run_peer
from tests.real_models import (
    chat_templates,
    gemma3_270m,
    llama3_tokenizer,
    qwen2_tokenizer,
    smollm2,
)

pytestmark = pytest.mark.real
TOKENIZERS = {
    smollm2: [19556, 28, 905, 17],
    gemma3_270m: [2, 9259, 236764, 1902, 236888],
    llama3_tokenizer: [128000, 9906, 11, 1917, 0],
    qwen2_tokenizer: [9707, 11, 1879, 0],
}
"""The makers' tokens of "Hello, world!"."""


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
def test_a_sentence_has_the_tokens_of_the_makers(make: object) -> None:
    assert callable(make)
    tokenizer = Tokenizer.from_file(str(make() / "tokenizer.json"))
    assert tokenizer.encode("Hello, world!").ids == TOKENIZERS[make]
    assert tokenizer.decode(TOKENIZERS[make]) == "Hello, world!"


def test_gemma_is_complete_and_completes_a_sentence(make_model: MakeModel, tmp_path: Path) -> None:
    folder = gemma3_270m()
    (tmp_path / "texts.json").write_text(json.dumps(["Roses are red, violets are"]))
    run_peer("read_model.py", folder, tmp_path / "texts.json", tmp_path / "out.json")
    read = json.loads((tmp_path / "out.json").read_text())
    assert (read["missing"], read["unexpected"]) == ([], [])
    weights = load_file(folder / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == 268_098_176
    model = make_model(preset=str(folder))
    (token_ids,) = read["token_ids"]
    logits = full_logits(model, model.weights, np.array([token_ids], np.int32))[0, -1]
    assert model.tokenizer.decode([int(logits.argmax())]).strip() == "blue"


def test_the_templates_of_many_families_are_there() -> None:
    names = {path.stem for path in chat_templates().glob("*.jinja")}
    assert len(names) == 36
    assert {"chatml", "gemma", "gemma3", "gemma4", "llama3", "mistral_v1", "qwen3"} <= names
