"""What is said to be detectable is detected four times in five, and nothing smaller is."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as scipy_stats

from job.evals.statistics import POWER, UNRELATED, mcnemar, mcnemar_power, minimum_detectable_effect

ONE_IN_FIVE = 0.2


def test_of_100_questions_a_change_under_13_points_cannot_be_seen_and_4183_show_2() -> None:
    """If one question in five changes sides."""
    small, large = (
        minimum_detectable_effect(100, ONE_IN_FIVE),
        minimum_detectable_effect(4183, ONE_IN_FIVE),
    )
    assert small is not None
    assert large is not None
    assert (math.ceil(100 * small), round(100 * large)) == (13, 2)
    assert large <= 0.02


def power_by_enumeration(questions: int, discordant: float, difference: float) -> float:
    """Every table there could be, each with the test itself."""
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
def test_a_detectable_change_is_found_four_times_in_five(questions: int, discordant: float) -> None:
    """By simulation: pairs are drawn, and the test is made."""
    difference = minimum_detectable_effect(questions, discordant)
    assert difference is not None

    def found(difference: float) -> float:
        shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
        drawn = np.random.default_rng(4).multinomial(questions, shares, size=1500)
        tables, counts = np.unique(drawn, axis=0, return_counts=True)
        shown = [mcnemar(int(gained), int(lost)) < 0.05 for gained, lost, _ in tables]
        return float(np.average(shown, weights=counts))

    assert found(difference) == pytest.approx(POWER, abs=0.035)
    assert found(0.8 * difference) < 0.7


def connor(questions: int, discordant: float) -> float:
    """The asymptotic formula for the same (Connor 1987, Biometrics 43:207)."""
    alpha, beta = scipy_stats.norm.ppf(0.975), scipy_stats.norm.ppf(POWER)

    def lacking(difference: float) -> float:
        spread = alpha * math.sqrt(discordant)
        spread += beta * math.sqrt(discordant - difference**2)
        return float(spread**2 / difference**2 - questions)

    return float(optimize.brentq(lacking, 1e-6, discordant))


@pytest.mark.parametrize("discordant", [0.05, 0.2, 0.5, 0.9])
def test_with_many_questions_it_is_the_published_formula(discordant: float) -> None:
    for questions, tolerance in ((1000, 0.06), (4183, 0.03)):
        found = minimum_detectable_effect(questions, discordant)
        assert found == pytest.approx(connor(questions, discordant), rel=tolerance)


@given(st.integers(1, 1500), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_it_is_a_share_that_the_test_finds(questions: int, discordant: float) -> None:
    found = minimum_detectable_effect(questions, discordant)
    if found is None:
        assert questions < 6
    else:
        assert 0 < found <= 1
        assert mcnemar_power(questions, max(discordant, found), found) >= POWER


def test_more_questions_and_fewer_that_change_show_less() -> None:
    for discordant in (0.0, 0.2, UNRELATED):
        found = [
            minimum_detectable_effect(questions, discordant) for questions in (20, 100, 1000, 4183)
        ]
        assert all(more > fewer for more, fewer in pairwise(f for f in found if f is not None))
    shares = [minimum_detectable_effect(1000, share) for share in (0.0, 0.05, 0.2, UNRELATED, 1.0)]
    assert sorted(shares) == shares


def test_five_questions_can_show_nothing() -> None:
    assert [minimum_detectable_effect(questions, 0.2) for questions in (1, 5)] == [None, None]
