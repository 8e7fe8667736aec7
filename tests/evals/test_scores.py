"""Scores of given tokens are those of a softmax over all logits, however rows are batched."""

import numpy as np
import pytest
from scipy.special import log_softmax

from job.evals.engine import Engine, TokenScore
from job.model.language_model import LanguageModel
from tests.conftest import MakeModel
from tests.model.forward import full_logits

ROWS = [3, 17, 40, 64, 65, 5]
"""Tokens of each row."""


def marked(length: int) -> tuple[list[int], list[bool]]:
    random = np.random.default_rng(length)
    marks = random.random(length) < 0.4
    marks[0], marks[-1] = False, True
    return random.integers(10, 500, length).tolist(), marks.tolist()


@pytest.fixture(scope="module")
def expected_logits(tiny: LanguageModel) -> np.ndarray:
    """KerasHub's logits of the rows, padded at the end to the longest."""
    tokens = np.zeros((len(ROWS), max(ROWS)), np.int32)
    for row, length in zip(tokens, ROWS, strict=True):
        row[:length] = marked(length)[0]
    mask = np.arange(max(ROWS)) < np.array(ROWS)[:, None]
    return full_logits(tiny, tiny.weights, tokens, mask.astype(np.int32))


@pytest.mark.parametrize(("devices", "batch"), [(1, 2), (2, 1), (1, 8)])
def test_scores_are_those_of_all_logits(
    make_model: MakeModel, expected_logits: np.ndarray, devices: int, batch: int
) -> None:
    model = make_model(devices=devices)
    rows = [marked(length) for length in ROWS]
    scores = Engine(model, batch, 256).score_tokens(model.weights, rows, "t")
    for (tokens, marks), row, score in zip(rows, expected_logits, scores, strict=True):
        log_probabilities = log_softmax(row[: len(tokens) - 1].astype(np.float64), axis=1)
        at = np.flatnonzero(marks)
        expected = log_probabilities[at - 1, np.array(tokens)[at]].sum()
        assert score.loglikelihood == pytest.approx(expected, abs=1e-4)
        assert score.tokens == len(at)
        likeliest = (log_probabilities[at - 1].argmax(axis=1) == np.array(tokens)[at]).all()
        assert score.is_greedy == likeliest


def test_the_likeliest_tokens_are_greedy(make_model: MakeModel) -> None:
    model = make_model()
    engine, prompt = Engine(model, 2, 256), [2, 30, 40, 50]
    logits = full_logits(model, model.weights, np.array([prompt]), np.ones((1, 4)))
    best, worst = int(logits[0, -1].argmax()), int(logits[0, -1].argmin())
    rows = [([*prompt, token], [False] * 4 + [True]) for token in (best, worst)]
    scores = engine.score_tokens(model.weights, rows, "t")
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[0].loglikelihood > scores[1].loglikelihood


def test_nothing_to_score_is_no_batch(make_model: MakeModel) -> None:
    model = make_model()
    assert Engine(model, 2, 256).score_tokens(model.weights, [], "t") == []
    (score,) = Engine(model, 2, 256).score_tokens(model.weights, [([2, 3], [False, False])], "t")
    assert score == TokenScore(0.0, 0, True)
