"""A stopped evaluation resumes after its last finished batch, with the same answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import RunStoppedError
from job.evals.engine import Engine
from job.evals.prediction_cache import PredictionCaches
from job.machine.distributed import ProcessGroup
from job.model.language_model import LanguageModel
from job.storage.local import LocalStore

KEY = "evals/baseline/first/partial.json"


def caches(folder: Path, inputs: object = "inputs") -> PredictionCaches:
    return PredictionCaches(LocalStore(folder), "baseline", inputs, ProcessGroup().broadcast)


def stopped_after(batches: int) -> Any:
    left = iter(range(batches))

    def check() -> None:
        if next(left, None) is None:
            raise RunStoppedError("stopped")

    return check


def prompts_of(model: LanguageModel) -> list[list[int]]:
    return model.tokenizer.encode_prompts([f"{'word ' * n}?" for n in range(1, 8)])


def test_generation_resumes_where_it_stopped(tiny: LanguageModel, tmp_path: Path) -> None:
    prompts = prompts_of(tiny)
    expected = Engine(tiny, 2, 512).generate(tiny.weights, prompts, 4, "t")

    with pytest.raises(RunStoppedError), caches(tmp_path) as progress:
        engine = Engine(tiny, 2, 512, stopped_after(2))
        engine.generate(tiny.weights, prompts, 4, "t", progress.open("first"))
    assert len(json.loads((tmp_path / KEY).read_text())["batches"]) == 2

    checks: list[int] = []
    with caches(tmp_path) as progress:
        engine = Engine(tiny, 2, 512, lambda: checks.append(1))
        resumed = engine.generate(tiny.weights, prompts, 4, "t", progress.open("first"))
    assert resumed == expected
    assert len(checks) == 2
    assert not (tmp_path / KEY).exists()


def test_cached_loglikelihoods_are_bit_identical(tiny: LanguageModel, tmp_path: Path) -> None:
    prompts, letters = prompts_of(tiny), tiny.tokenizer.letter_tokens("ABCD")
    expected = Engine(tiny, 2, 512).loglikelihood(tiny.weights, prompts, letters, "t")
    with pytest.raises(ZeroDivisionError), caches(tmp_path) as progress:
        Engine(tiny, 2, 512).loglikelihood(
            tiny.weights, prompts, letters, "t", progress.open("first")
        )
        raise ZeroDivisionError
    with caches(tmp_path) as progress:
        engine = Engine(tiny, 2, 512, stopped_after(0))  # nothing is left to run
        again = engine.loglikelihood(tiny.weights, prompts, letters, "t", progress.open("first"))
    assert again.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"inputs": "other", "batches": {"0": []}}']
)
def test_a_damaged_cache_or_one_of_other_inputs_is_ignored(content: bytes, tmp_path: Path) -> None:
    LocalStore(tmp_path).write(KEY, content)
    assert caches(tmp_path).open("first").get(0) is None
