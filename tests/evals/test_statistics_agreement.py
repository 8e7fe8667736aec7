"""Each statistic agrees with a second implementation, and keeps what it promises."""

import math
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from job.evals.statistics import FEWEST, bootstrap, bootstrap_test, holm, mcnemar, wilson

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(st.integers(1, 5000), st.data())
def test_wilson_is_that_of_statsmodels(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    theirs = proportion_confint(successes, trials, method="wilson")
    assert wilson(successes, trials) == pytest.approx(theirs, abs=1e-9)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_mcnemar_is_that_of_statsmodels(gained: int, lost: int) -> None:
    theirs = their_mcnemar([[7, gained], [lost, 9]], exact=True).pvalue if gained + lost else 1
    assert mcnemar(gained, lost) == pytest.approx(theirs, rel=1e-9)


@given(P_VALUES)
@settings(deadline=None, max_examples=25)  # theirs is slow
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    _, theirs, _, _ = multipletests(p_values, method="holm")
    assert holm(p_values) == pytest.approx(list(theirs))


def test_holm_gives_the_values_worked_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(P_VALUES, st.randoms())
def test_holm_only_raises_and_keeps_the_order_whatever_the_places(
    p_values: list[float], random: Random
) -> None:
    corrected = holm(p_values)
    assert all(p <= found <= 1 for p, found in zip(p_values, corrected, strict=True))
    assert min(corrected) == min(1, len(p_values) * min(p_values))
    places = list(range(len(p_values)))
    random.shuffle(places)
    shuffled = holm([p_values[place] for place in places])
    assert shuffled == [corrected[place] for place in places]
    for before, after in pairwise(sorted(zip(p_values, corrected, strict=True))):
        assert before[1] <= after[1]


def test_holm_finds_something_where_there_is_nothing_less_than_1_time_in_20() -> None:
    generator = np.random.default_rng(3)
    found = sum(min(holm(generator.uniform(size=6).tolist())) < 0.05 for _ in range(4000))
    assert 150 <= found <= 245


@pytest.mark.parametrize("size", [12, 60, 300])
def test_bootstrap_is_that_of_scipy(size: int) -> None:
    values = np.random.default_rng(size).gamma(2, size=size)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert bootstrap(values.tolist(), 20_000, 0).ci95 == pytest.approx(theirs, abs=0.02 * width)


def test_wilson_covers_the_true_share_about_95_times_in_100() -> None:
    # Exactly, not by simulation: the chance of each count times whether its interval holds.
    trials = 100
    intervals = np.array([wilson(count, trials) for count in range(trials + 1)])
    shares = np.linspace(0.02, 0.98, 97)
    holds = (intervals[:, :1] <= shares) & (shares <= intervals[:, 1:])
    chance = scipy_stats.binom.pmf(np.arange(trials + 1)[:, None], trials, shares)
    coverage = (holds * chance).sum(axis=0)
    assert 0.945 < coverage.mean() < 0.96
    assert coverage.min() > 0.90


@pytest.mark.parametrize("changed", [5, 6, 20, 100, 837])
def test_mcnemar_finds_a_change_where_there_is_none_less_than_1_time_in_20(changed: int) -> None:
    gained = np.arange(changed + 1)
    found = [mcnemar(int(g), changed - int(g)) < 0.05 for g in gained]
    assert scipy_stats.binom.pmf(gained, changed, 0.5)[found].sum() < 0.05


DIFFERENCES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


@given(DIFFERENCES, st.integers(0, 99))
@settings(deadline=None)
def test_the_paired_bootstrap_has_two_sides_and_agrees_with_its_interval(
    differences: list[float], seed: int
) -> None:
    estimate, p_value = bootstrap_test(differences, 400, seed)
    assert estimate == bootstrap(differences, 400, seed)
    assert bootstrap_test([-d for d in differences], 400, seed)[1] == p_value
    assert 2 / 401 <= p_value <= 1
    if len(differences) < FEWEST:
        assert p_value == 1
        return
    low, high = estimate.ci95
    if p_value < 0.045:
        assert low > 0 or high < 0
    if low > 0 or high < 0:
        assert p_value < 0.055


def test_the_paired_bootstrap_is_a_z_test_where_there_are_many_values() -> None:
    values = np.random.default_rng(5).normal(0.03, 1.0, size=4000)
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    expected = 2 * scipy_stats.norm.sf(abs(z))
    assert bootstrap_test(values.tolist(), 20_000, 0)[1] == pytest.approx(expected, abs=0.01)


def test_the_paired_bootstrap_finds_a_change_where_there_is_none_about_1_time_in_20() -> None:
    generator = np.random.default_rng(6)
    found = sum(
        bootstrap_test(generator.normal(size=60).tolist(), 400, seed)[1] < 0.05
        for seed in range(600)
    )
    assert 15 <= found <= 50


def test_equal_answers_are_no_change() -> None:
    assert bootstrap_test([0.0] * 30, 400, 0)[1] == 1
    assert bootstrap_test([0.2] * 30, 400, 0)[1] == 2 / 401
