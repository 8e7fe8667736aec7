"""Statistics agree with scipy and statsmodels, and keep their error rates."""

import math
from itertools import pairwise
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from job.evals.statistics import (
    MIN_BOOTSTRAP_ITEMS,
    Bootstrap,
    bootstrap_mean,
    bootstrap_test,
    holm,
    mcnemar,
    wilson,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(st.integers(1, 5000), st.data())
def test_wilson_agrees_with_statsmodels(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = proportion_confint(successes, trials, method="wilson")
    assert wilson(successes, trials) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_mcnemar_agrees_with_statsmodels(gained: int, lost: int) -> None:
    expected = (
        statsmodels_mcnemar([[7, gained], [lost, 9]], exact=True).pvalue if gained + lost else 1
    )
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


@given(P_VALUES)
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    with mock.patch("gc.collect"):  # `multipletests` collects garbage, 0.2 s per call
        _, expected, _, _ = multipletests(p_values, method="holm")
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_gives_values_computed_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(P_VALUES, st.randoms())
def test_holm_only_raises_p_values_and_keeps_their_order(
    p_values: list[float], random: Random
) -> None:
    adjusted = holm(p_values)
    assert all(p <= adjusted <= 1 for p, adjusted in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == min(1, len(p_values) * min(p_values))
    order = list(range(len(p_values)))
    random.shuffle(order)
    shuffled = holm([p_values[i] for i in order])
    assert shuffled == [adjusted[i] for i in order]
    for before, after in pairwise(sorted(zip(p_values, adjusted, strict=True))):
        assert before[1] <= after[1]


def test_holm_keeps_the_family_wise_error_rate() -> None:
    generator = np.random.default_rng(3)
    rejected = sum(min(holm(generator.uniform(size=6).tolist())) < 0.05 for _ in range(4000))
    assert 150 <= rejected <= 245


@pytest.mark.parametrize("size", [12, 60, 300])
def test_bootstrap_agrees_with_scipy(size: int) -> None:
    values = np.random.default_rng(size).gamma(2, size=size)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    assert bootstrap_mean(values.tolist(), Bootstrap(20_000, 0)).ci95 == pytest.approx(
        expected, abs=0.02 * width
    )


def test_wilson_covers_the_proportion_95_percent() -> None:
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
def test_mcnemar_keeps_its_error_rate(changed: int) -> None:
    gained = np.arange(changed + 1)
    rejected = [mcnemar(int(g), changed - int(g)) < 0.05 for g in gained]
    assert scipy_stats.binom.pmf(gained, changed, 0.5)[rejected].sum() < 0.05


DIFFERENCES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


@given(DIFFERENCES, st.integers(0, 99))
@settings(deadline=None)
def test_bootstrap_test_agrees_with_its_interval(differences: list[float], seed: int) -> None:
    estimate, p_value = bootstrap_test(differences, Bootstrap(400, seed))
    assert estimate == bootstrap_mean(differences, Bootstrap(400, seed))
    assert bootstrap_test([-d for d in differences], Bootstrap(400, seed))[1] == p_value
    assert 2 / 401 <= p_value <= 1
    if len(differences) < MIN_BOOTSTRAP_ITEMS:
        assert p_value == 1
        return
    low, high = estimate.ci95
    if p_value < 0.045:
        assert low > 0 or high < 0
    if low > 0 or high < 0:
        assert p_value < 0.055


def test_bootstrap_test_is_a_z_test_with_many_values() -> None:
    values = np.random.default_rng(5).normal(0.03, 1.0, size=4000)
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    expected = 2 * scipy_stats.norm.sf(abs(z))
    assert bootstrap_test(values.tolist(), Bootstrap(20_000, 0))[1] == pytest.approx(
        expected, abs=0.01
    )


def test_bootstrap_test_keeps_its_error_rate() -> None:
    generator = np.random.default_rng(6)
    rejected = sum(
        bootstrap_test(generator.normal(size=60).tolist(), Bootstrap(400, seed))[1] < 0.05
        for seed in range(600)
    )
    assert 15 <= rejected <= 50


def test_equal_differences_have_extreme_p_values() -> None:
    assert bootstrap_test([0.0] * 30, Bootstrap(400, 0))[1] == 1
    assert bootstrap_test([0.2] * 30, Bootstrap(400, 0))[1] == 2 / 401
