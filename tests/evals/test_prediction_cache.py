"""A stopped evaluation resumes after its last finished batch, with the same answers."""

import json
from pathlib import Path

import pytest

from job.errors import RunStoppedError
from job.evals.engine import Engine
from job.evals.prediction_cache import PredictionCache
from job.machine.distributed import ProcessGroup
from job.model.language_model import LanguageModel
from job.storage.local import LocalStore

KEY = "caches/partial.json"


def cache_in(folder: Path, inputs: object = "inputs") -> PredictionCache:
    return PredictionCache(LocalStore(folder), KEY, inputs, ProcessGroup().broadcast)


class Stopper:
    """Counts batches, and stops the engine when `left` have run."""

    def __init__(self) -> None:
        self.left = 100

    def check(self) -> None:
        if self.left == 0:
            raise RunStoppedError("stopped")
        self.left -= 1


def prompts_of(model: LanguageModel) -> list[list[int]]:
    return model.tokenizer.encode_prompts([f"{'word ' * n}?" for n in range(1, 8)])


def test_generation_resumes_where_it_stopped(tiny: LanguageModel, tmp_path: Path) -> None:
    stopper, prompts = Stopper(), prompts_of(tiny)
    engine = Engine(tiny, 2, 512, stopper.check)
    expected = engine.generate(tiny.weights, prompts, 4, "t")

    stopper.left = 2
    with pytest.raises(RunStoppedError), cache_in(tmp_path) as cache:
        engine.generate(tiny.weights, prompts, 4, "t", cache)
    assert len(json.loads((tmp_path / KEY).read_text())["batches"]["t"]) == 2

    stopper.left = 2  # of 4 batches
    with cache_in(tmp_path) as cache:
        resumed = engine.generate(tiny.weights, prompts, 4, "t", cache)
    assert resumed == expected
    assert stopper.left == 0
    assert not (tmp_path / KEY).exists()


def test_cached_loglikelihoods_are_bit_identical(tiny: LanguageModel, tmp_path: Path) -> None:
    stopper, prompts = Stopper(), prompts_of(tiny)
    engine, letters = Engine(tiny, 2, 512, stopper.check), tiny.tokenizer.letter_tokens("ABCD")
    with pytest.raises(ZeroDivisionError), cache_in(tmp_path) as cache:
        first = engine.loglikelihood(tiny.weights, prompts, letters, "t", cache)
        raise ZeroDivisionError
    stopper.left = 0  # everything is cached
    with cache_in(tmp_path) as cache:
        again = engine.loglikelihood(tiny.weights, prompts, letters, "t", cache)
    assert again.tobytes() == first.tobytes()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"inputs": "other", "batches": {"t": {"0": []}}}']
)
def test_a_damaged_cache_or_one_of_other_inputs_is_ignored(content: bytes, tmp_path: Path) -> None:
    LocalStore(tmp_path).write(KEY, content)
    assert cache_in(tmp_path).get("t", 0) is None
