"""Intervals and tests have published and hand-computed values; Holm covers all tests."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.evals.statistics import (
    Bootstrap,
    apply_holm,
    bootstrap_mean,
    finding_of_interval,
    finding_of_test,
    holm,
    mcnemar,
    paired_tests,
    wilson,
)
from job.results import Evaluation, Finding, Interval, PairedTest
from tests.report import full


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_trials_is_0_to_1() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_contains_the_proportion_and_mirrors(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (0, 10, 2 / 2**10),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (7, 3, 2 * (1 + 10 + 45 + 120) / 2**10),
        (86, 150, 3.716e-05),  # Fay, exact2x2: approval ratings of Agresti 1990
    ],
)
def test_mcnemar_gives_the_exact_p_values(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-3)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_two_sided(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert 0 < mcnemar(gained, lost) <= 1


VALUES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


@given(VALUES, st.integers(0, 99))
@settings(deadline=None)
def test_bootstrap_interval_contains_the_mean(values: list[float], seed: int) -> None:
    estimate = bootstrap_mean(values, Bootstrap(200, seed))
    low, high = estimate.ci95
    assert estimate.mean == pytest.approx(math.fsum(values) / len(values))
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


@given(VALUES, st.integers(0, 99))
@settings(deadline=None)
def test_bootstrap_interval_mirrors_and_shifts(values: list[float], seed: int) -> None:
    low, high = bootstrap_mean(values, Bootstrap(200, seed)).ci95
    mirrored = bootstrap_mean([-value for value in values], Bootstrap(200, seed)).ci95
    moved = bootstrap_mean([value + 3 for value in values], Bootstrap(200, seed)).ci95
    assert mirrored == pytest.approx((-high, -low))
    assert moved == pytest.approx((low + 3, high + 3))


def test_bootstrap_interval_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=100).tolist()
    assert bootstrap_mean(values, Bootstrap(500, 7)) == bootstrap_mean(values, Bootstrap(500, 7))
    assert (
        bootstrap_mean(values, Bootstrap(500, 7)).ci95
        != bootstrap_mean(values, Bootstrap(500, 8)).ci95
    )


def test_equal_values_give_an_empty_interval() -> None:
    assert bootstrap_mean([0.25], Bootstrap(100, 0)).ci95 == (0.25, 0.25)
    assert bootstrap_mean([1.0] * 50, Bootstrap(100, 0)).ci95 == (1.0, 1.0)


def test_bootstrap_interval_is_normal_with_many_values() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, size=6000)
    low, high = bootstrap_mean(values.tolist(), Bootstrap(2000, 0)).ci95
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=error * 0.1
    )


def test_bootstrap_interval_covers_the_mean_95_percent() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for seed in range(400):
        low, high = bootstrap_mean(
            generator.normal(1.0, size=60).tolist(), Bootstrap(400, seed)
        ).ci95
        covered += low <= 1.0 <= high
    assert 360 <= covered <= 392


@pytest.mark.parametrize(
    ("function", "arguments", "finding"),
    [
        (finding_of_test, (0.1, 0.049), "improved"),
        (finding_of_test, (-0.1, 0.049), "worse"),
        (finding_of_test, (0.1, 0.05), "no measurable change"),
        (finding_of_test, (0.0, 0.001), "no measurable change"),
        (finding_of_test, (-0.1, 1.0), "no measurable change"),
        (finding_of_interval, ((0.01, 0.2), 10), "improved"),
        (finding_of_interval, ((-0.2, -0.01), 99), "worse"),
        (finding_of_interval, ((-0.1, 0.1), 99), "no measurable change"),
        (finding_of_interval, ((0.0, 0.1), 99), "no measurable change"),
        (finding_of_interval, ((-0.1, 0.0), 99), "no measurable change"),
        (finding_of_interval, ((0.01, 0.2), 9), "no measurable change"),
    ],
)
def test_findings(
    function: Callable[..., Finding],
    arguments: tuple[float | int | Interval, ...],
    finding: Finding,
) -> None:
    assert function(*arguments) == finding


def evaluation(*p_values: float) -> Evaluation:
    """Return two comparisons of accuracies and one of dialogues, each a change on its own."""
    document = full()["evaluation"]
    document["dialogue"]["markers"] = []
    tests = [*document["multiple_choice"][0]["comparisons"], document["dialogue"]["comparison"]]
    for test, p_value in zip(tests, p_values, strict=True):
        test |= {"p_value": p_value, "p_holm": p_value, "finding": "improved"}
    return Evaluation.model_validate(document)


def values(tests: list[PairedTest]) -> list[tuple[float, float, str]]:
    return [(test.p_value, test.p_holm, test.finding) for test in tests]


def test_every_test_is_corrected_for_the_others() -> None:
    p_values = [0.04, 0.001, 0.02]
    tests = paired_tests(apply_holm(evaluation(*p_values)))
    assert [test.p_value for test in tests] == p_values
    assert [test.p_holm for test in tests] == holm(p_values) == pytest.approx([0.04, 0.003, 0.04])


def test_the_correction_removes_findings() -> None:
    tests = paired_tests(apply_holm(evaluation(0.03, 0.2, 0.001)))
    assert [test.finding for test in tests] == [
        "no measurable change",
        "no measurable change",
        "improved",
    ]


def test_the_correction_adds_no_finding() -> None:
    given = evaluation(0.001, 0.001, 0.001)
    dialogue = given.dialogue
    assert dialogue is not None
    unsure = dialogue.comparison.model_copy(update={"finding": "no measurable change"})
    given = given.model_copy(
        update={"dialogue": dialogue.model_copy(update={"comparison": unsure})}
    )
    assert values(paired_tests(apply_holm(given)))[2] == (0.001, 0.003, "no measurable change")


def test_correcting_twice_changes_nothing() -> None:
    given = evaluation(0.03, 0.2, 0.001)
    once = apply_holm(given)
    assert apply_holm(once) == once
    assert once.side_by_side == given.side_by_side
    assert once.multiple_choice[0].models == given.multiple_choice[0].models


def test_a_single_test_is_not_corrected() -> None:
    alone = evaluation(0.03, 0.2, 0.001).model_copy(update={"multiple_choice": []})
    assert values(paired_tests(apply_holm(alone))) == [(0.001, 0.001, "improved")]
    nothing = alone.model_copy(update={"dialogue": None})
    assert apply_holm(nothing) == nothing
