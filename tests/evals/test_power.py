"""The minimum detectable effect is detected four times in five, and smaller ones are not."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from job.evals.statistics import (
    POWER,
    WORST_DISCORDANCE,
    mcnemar,
    mcnemar_power,
    minimum_detectable_effect,
)

ONE_IN_FIVE = 0.2


def test_100_questions_detect_13_points_and_4183_detect_2() -> None:
    """With one question in five discordant."""
    small, large = (
        minimum_detectable_effect(100, ONE_IN_FIVE),
        minimum_detectable_effect(4183, ONE_IN_FIVE),
    )
    assert small is not None
    assert large is not None
    assert (math.ceil(100 * small), round(100 * large)) == (13, 2)
    assert large <= 0.02


def power_by_enumeration(questions: int, discordant: float, difference: float) -> float:
    """Sum over every possible table, with the test itself."""
    shares = [
        (discordant + difference) / 2,
        (discordant - difference) / 2,
        1 - discordant,
    ]
    return sum(
        scipy_stats.multinomial.pmf([gained, lost, questions - gained - lost], questions, shares)
        for gained in range(questions + 1)
        for lost in range(questions + 1 - gained)
        if mcnemar(gained, lost) < 0.05
    )


@pytest.mark.parametrize(
    ("questions", "discordant", "difference"),
    [(8, 1.0, 0.9), (25, 0.3, 0.0), (25, 0.5, 0.4), (30, 0.2, 0.2)],
)
def test_power_is_the_sum_over_all_tables(
    questions: int, discordant: float, difference: float
) -> None:
    expected = power_by_enumeration(questions, discordant, difference)
    assert mcnemar_power(questions, discordant, difference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("questions", "discordant"), [(100, 0.2), (100, 0.5), (4183, 0.2)])
def test_the_effect_is_detected_with_80_percent_power(questions: int, discordant: float) -> None:
    """Simulate pairs and test them."""
    difference = minimum_detectable_effect(questions, discordant)
    assert difference is not None

    def simulated_power(difference: float) -> float:
        shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
        tables = np.random.default_rng(4).multinomial(questions, shares, size=1500)
        tables, counts = np.unique(tables, axis=0, return_counts=True)
        detected = [mcnemar(int(gained), int(lost)) < 0.05 for gained, lost, _ in tables]
        return float(np.average(detected, weights=counts))

    assert simulated_power(difference) == pytest.approx(POWER, abs=0.035)
    assert simulated_power(0.8 * difference) < 0.7


def connor(questions: int, discordant: float) -> float:
    """Return the effect by the asymptotic formula (Connor 1987, Biometrics 43:207)."""
    alpha, beta = scipy_stats.norm.ppf(0.975), scipy_stats.norm.ppf(POWER)

    def lacking(difference: float) -> float:
        spread = alpha * math.sqrt(discordant)
        spread += beta * math.sqrt(discordant - difference**2)
        return float(spread**2 / difference**2 - questions)

    return float(optimize.brentq(lacking, 1e-6, discordant))


@pytest.mark.parametrize("discordant", [0.05, 0.2, 0.5, 0.9])
def test_many_questions_agree_with_the_published_formula(discordant: float) -> None:
    for questions, tolerance in ((1000, 0.06), (4183, 0.03)):
        effect = minimum_detectable_effect(questions, discordant)
        assert effect == pytest.approx(connor(questions, discordant), rel=tolerance)


@given(st.integers(1, 1500), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_the_effect_is_a_share_that_the_test_detects(questions: int, discordant: float) -> None:
    effect = minimum_detectable_effect(questions, discordant)
    if effect is None:
        assert questions < 6
    else:
        assert 0 < effect <= 1
        assert mcnemar_power(questions, max(discordant, effect), effect) >= POWER


def test_more_questions_detect_smaller_effects() -> None:
    for discordant in (0.0, 0.2, WORST_DISCORDANCE):
        effects = [
            minimum_detectable_effect(questions, discordant) for questions in (20, 100, 1000, 4183)
        ]
        assert all(more > fewer for more, fewer in pairwise(e for e in effects if e is not None))
    shares = (0.0, 0.05, 0.2, WORST_DISCORDANCE, 1.0)
    effects = [minimum_detectable_effect(1000, share) for share in shares]
    assert sorted(effects) == effects


def test_five_questions_detect_nothing() -> None:
    assert [minimum_detectable_effect(questions, 0.2) for questions in (1, 5)] == [None, None]
