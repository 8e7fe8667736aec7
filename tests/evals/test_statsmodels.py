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
    SIGN_FLIPS,
    Bootstrap,
    bootstrap_mean,
    holm,
    mcnemar,
    not_worse,
    paired_interval,
    paired_score,
    questions_for_retention,
    sign_flip_test,
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
@settings(deadline=None, max_examples=60)
def test_sign_flip_interval_inverts_the_test(differences: list[float], seed: int) -> None:
    bootstrap = Bootstrap(400, seed)
    estimate, p_value = sign_flip_test(differences, bootstrap)
    low, high = estimate.ci95
    rounding = 1e-12 * max(map(abs, differences))
    assert min(differences) - rounding <= low <= high <= max(differences) + rounding
    assert 2 / (SIGN_FLIPS + 1) <= p_value <= 1
    if len(differences) > 5:  # with fewer no p-value is below 5%
        assert (p_value < 0.05) == (low > 0 or high < 0)
    assert sign_flip_test([-d for d in differences], bootstrap)[1] == p_value


def test_sign_flip_test_agrees_with_scipy() -> None:
    values = np.random.default_rng(5).gamma(2, size=40) - 1.6
    expected = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=50_000,
        rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    assert sign_flip_test(values.tolist(), Bootstrap(50_000, 0))[1] == pytest.approx(
        expected, abs=0.005
    )


@pytest.mark.parametrize("size", [10, 30, pytest.param(200, marks=pytest.mark.slow)])
def test_sign_flip_test_keeps_its_error_rate(size: int) -> None:
    generator = np.random.default_rng(size)
    rejected = covered = 0
    for seed in range(200):
        # Scores of two equal models: skewed, but exchangeable.
        values = generator.gamma(0.5, size=(2, size))
        estimate, p_value = sign_flip_test((values[0] - values[1]).tolist(), Bootstrap(0, seed))
        rejected += p_value < 0.05
        covered += estimate.ci95[0] <= 0 <= estimate.ci95[1]
    assert 1 <= rejected <= 19  # 10 expected, within 3 standard deviations
    assert covered == 200 - rejected


def test_equal_differences_have_extreme_p_values() -> None:
    assert sign_flip_test([0.0] * 30, Bootstrap(400, 0))[1] == 1
    assert sign_flip_test([0.2] * 30, Bootstrap(400, 0))[1] == 2 / (SIGN_FLIPS + 1)


@pytest.mark.parametrize("questions", [20, 50])
def test_paired_interval_covers_the_difference_95_percent(questions: int) -> None:
    # Exactly: the chance of each count of gained and lost questions times whether it holds.
    counts = [(g, n - g) for n in range(questions + 1) for g in range(n + 1)]
    intervals = np.array([paired_interval(g, lost, questions) for g, lost in counts])
    coverages = []
    for gained, lost in [(0.05, 0.05), (0.2, 0.1), (0.3, 0.3), (0.1, 0.02), (0.5, 0.1)]:
        others = 1 - gained - lost
        table = [(g, n, questions - g - n) for g, n in counts]
        chance = scipy_stats.multinomial.pmf(table, questions, [gained, lost, others])
        holds = (intervals[:, 0] <= gained - lost) & (gained - lost <= intervals[:, 1])
        coverages.append(float(chance[holds].sum()))
    assert min(coverages) > 0.93
    assert 0.94 < np.mean(coverages) < 0.975


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_paired_interval_mirrors_and_has_a_width(gained: int, lost: int, same: int) -> None:
    questions = gained + lost + same + 1
    low, high = paired_interval(gained, lost, questions)
    assert -1 <= low < (gained - lost) / questions < high <= 1
    assert paired_interval(lost, gained, questions) == pytest.approx((-high, -low), abs=1e-6)


def test_paired_interval_has_published_values() -> None:
    # Fagerland, Lydersen and Laake 2014, table VI: 21 children, 1 and 7 discordant.
    assert paired_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z = scipy_stats.norm.isf(0.025)
    edge = z**2 / (100 + z**2)
    assert paired_interval(0, 0, 100) == pytest.approx((-edge, edge), abs=1e-6)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_paired_score_at_0_is_that_of_mcnemar(gained: int, lost: int, same: int) -> None:
    if gained + lost:
        expected = (gained - lost) / math.sqrt(gained + lost)
        questions = gained + lost + same
        assert paired_score(gained, lost, questions, 0.0) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("questions", "margin"), [(60, 0.1), (100, 0.05)])
def test_a_drop_of_the_margin_is_rarely_called_not_worse(questions: int, margin: float) -> None:
    """Exactly: the size of the test where the accuracy falls by the margin."""
    counts = [(g, n - g) for n in range(questions + 1) for g in range(n + 1)]
    found = np.array([not_worse(g, lost, questions, margin) < 0.05 for g, lost in counts])
    sizes = []
    for gained in (0.02, 0.1, 0.2):
        lost = gained + margin
        table = [(g, n, questions - g - n) for g, n in counts]
        chance = scipy_stats.multinomial.pmf(table, questions, [gained, lost, 1 - gained - lost])
        sizes.append(float(chance[found].sum()))
    assert max(sizes) < 0.06
    assert np.mean(sizes) > 0.03


def test_enough_questions_show_that_nothing_got_worse() -> None:
    generator = np.random.default_rng(11)
    questions = questions_for_retention(0.2, 0.03)
    assert questions == 1374  # 0.2 (1.645 + 0.842)^2 / 0.03^2
    drawn = generator.multinomial(questions, [0.1, 0.1, 0.8], size=1000)
    found = sum(not_worse(int(g), int(lost), questions, 0.03) < 0.05 for g, lost, _ in drawn)
    assert 750 <= found <= 850
