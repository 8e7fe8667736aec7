"""The preset with real weights is SmolLM2, here and in transformers."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - lets safetensors read bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from job.model.language_model import LanguageModel
from tests.conftest import MakeModel
from tests.model.forward import full_logits
from tests.peers import run_peer
from tests.real_models import smollm2

pytestmark = pytest.mark.real
PROMPTS = [
    "The capital of France is",
    "Water boils at 100 degrees",
    "def add(a, b):\n    return",
    "Once upon a time, there was a little",
    "<|im_start|>user\nWhat causes a fever?<|im_end|>\n<|im_start|>assistant\n",
]
WITHIN = 1e-3  # of logits of about 20


def samples() -> list[str]:
    lines = (resources.files("job") / "samples/dialogues.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:100]]
    return [row[column] for row in rows for column in ("input", "output")]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers reads in the folder."""
    folder = tmp_path_factory.mktemp("read")
    (folder / "texts.json").write_text(json.dumps(samples()))
    run_peer("read_model.py", smollm2(), folder / "texts.json", folder / "out.json")
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def loaded(make_model: MakeModel) -> LanguageModel:
    return make_model(preset=str(smollm2()))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def logits(loaded: LanguageModel, prompts: list[list[int]]) -> list[np.ndarray]:
    """Float32 `[length, vocabulary]` of each prompt, by this job."""
    return [full_logits(loaded, loaded.weights, np.array([ids], np.int32))[0] for ids in prompts]


def test_transformers_finds_every_weight_and_no_other(read: dict[str, Any]) -> None:
    assert (read["missing"], read["unexpected"]) == ([], [])
    weights = load_file(smollm2() / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == 134_515_008
    assert weights.keys() == read["weights"].keys()
    for name, weight in weights.items():
        shape, *sums = read["weights"][name]
        ours = weight.astype(np.float64)
        assert list(ours.shape) == shape
        np.testing.assert_allclose([ours.sum(), np.square(ours).sum()], sums, rtol=1e-9, atol=1e-9)


def test_transformers_splits_200_real_texts_into_the_same_tokens(read: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
    assert len(samples()) == 200
    assert [encoding.ids for encoding in tokenizer.encode_batch(samples())] == read["token_ids"]


def test_transformers_computes_the_logits_of_this_job(
    logits: list[np.ndarray], prompts: list[list[int]], tmp_path: Path
) -> None:
    request = {"model": str(smollm2()), "adapter": None, "merge": False, "prompts": prompts,
               "out": str(tmp_path / "logits.npz")}  # fmt: skip
    (tmp_path / "requests.json").write_text(json.dumps([request]))
    run_peer("logits.py", tmp_path / "requests.json")
    with np.load(tmp_path / "logits.npz") as theirs:
        for number, ours in enumerate(logits):
            assert np.isfinite(ours).all()
            np.testing.assert_allclose(ours, theirs[str(number)], atol=WITHIN)


def test_it_knows_what_a_language_model_knows(logits: list[np.ndarray]) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2() / "tokenizer.json"))
    words = [tokenizer.decode([int(rows[-1].argmax())]) for rows in logits]
    assert words[:4] == [" Paris", " Celsius", " a", " girl"]


def test_its_folder_names_the_license_and_has_the_chat_template() -> None:
    config = json.loads((smollm2() / "tokenizer_config.json").read_text())
    assert "<|im_start|>assistant" in config["chat_template"]
    assert "license: apache-2.0" in (smollm2() / "README.md").read_text()
