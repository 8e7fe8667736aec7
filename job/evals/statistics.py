"""Confidence intervals, paired tests, power, and the correction for multiple tests.

scipy does the arithmetic where it can. Intervals are 95%; tests are two-sided at the 5% level,
shared by the tests of a family (see `paired.decide_findings`). Of the questions that two models
answered, `gained` counts those that only the second got right, `lost` those that only the first
did; `discordant` is the share of both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from job.scores import Estimate, Interval, Share

ALPHA = 0.05
POWER = 0.8
"""Probability that a test detects a change of its minimum detectable effect."""

MIN_ITEMS = 50
"""With fewer items no change of a mean is claimed, and none is excluded."""

SIGN_FLIPS = 20_000
"""Random sign flips of a permutation test, at least: its smallest p-value is 1 in 10,000, which
decides after Holm's correction for hundreds of tests too."""

WORST_DISCORDANCE = 0.5
"""Share of questions that exactly one of two unrelated models gets right.

It is p(1-q) + q(1-p) for accuracies p and q, at most 1/2 unless one model avoids what the other
gets right. This is the assumption before anything is measured.
"""

_MAX_RANDOM_NUMBERS = 4_000_000
"""Random numbers held in memory at a time."""

_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Bootstrap:
    """Settings of a bootstrap. The same settings and values give the same interval."""

    samples: int
    seed: int


def wilson(successes: int, trials: int) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return (0.0, 1.0)
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return (float(interval.low), float(interval.high))


def proportion(count: int, of: int) -> Share:
    """Return `count / of` with its Wilson interval."""
    return Share(count=count, of=of, share=count / of if of else 0.0, ci95=wilson(count, of))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test (McNemar 1947)."""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    bootstrap: Bootstrap,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means,
) -> Estimate:
    """Return the mean and its percentile bootstrap interval (Efron 1979).

    Args:
        values: one per item, or a row of several; not empty.
        statistic: what to compute from the means, [..., values of a row], instead of them.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(bootstrap.seed)
    chunk = max(1, _MAX_RANDOM_NUMBERS // array.size)
    means = []
    for start in range(0, bootstrap.samples, chunk):
        count = min(chunk, bootstrap.samples - start)
        indices = generator.integers(0, len(array), size=(count, len(array)))
        means.append(array[indices].mean(axis=1))
    low, high = np.percentile(statistic(np.concatenate(means)), (2.5, 97.5))
    mean = float(statistic(array.mean(axis=0)))
    return Estimate(mean=mean, ci95=(float(low), float(high)))


def sign_flip_test(differences: Sequence[float], bootstrap: Bootstrap) -> tuple[Estimate, float]:
    """Return the mean difference, and the p-value for a center of 0 by random sign flips.

    If nothing changed, each difference is as likely as its negative (Fisher 1935). The interval
    holds the centers that the test does not reject: it is found from means of random subsets
    (Hartigan 1969), since flipping the signs of a subset raises the mean above the observed one
    exactly if the subset's mean is below the center. There must be a difference.
    """
    array = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(bootstrap.seed)
    draws = max(bootstrap.samples, SIGN_FLIPS)
    chunk = max(1, _MAX_RANDOM_NUMBERS // len(array))
    sums, sizes = [], []
    for start in range(0, draws, chunk):
        subsets = generator.random((min(chunk, draws - start), len(array))) < 0.5
        sums.append(subsets @ array)
        sizes.append(subsets.sum(axis=1))
    size = np.concatenate(sizes)
    means = np.sort(np.concatenate(sums)[size > 0] / size[size > 0])
    same = draws - len(means)  # empty subsets flip nothing
    tail = min((means <= 0).sum(), (means >= 0).sum()) + same
    p_value = min(1.0, 2 * (1 + int(tail)) / (1 + draws))
    rank = max(0, math.ceil(ALPHA / 2 * (1 + draws)) - 2 - same)
    interval = (float(means[rank]), float(means[-1 - rank]))
    return Estimate(mean=float(array.mean()), ci95=interval), p_value


def paired_interval(gained: int, lost: int, questions: int) -> Interval:
    """Return the score interval of a difference of paired proportions (Tango 1998).

    It has a width even if no question changed: those that were not asked may have.
    """
    limit = float(stats.norm.isf(ALPHA / 2))
    observed = (gained - lost) / questions

    def excess(sign: int) -> Callable[[float], float]:
        return lambda center: sign * paired_score(gained, lost, questions, center) - limit

    edge = 1 - 1e-9
    ends = [
        sign * edge
        if excess(-sign)(sign * edge) <= 0
        else float(optimize.brentq(excess(-sign), observed, sign * edge))
        for sign in (-1, 1)
    ]
    return ends[0], ends[1]


def paired_score(gained: int, lost: int, questions: int, center: float) -> float:
    """Return Tango's score statistic of a difference of paired proportions.

    It is standard normal if the difference is `center`, above -1 and below 1.
    """
    linear = -gained - lost + (2 * questions - gained + lost) * center
    constant = -lost * center * (1 - center)
    root = math.sqrt(max(0.0, linear**2 - 8 * questions * constant))
    rarer = (root - linear) / (4 * questions)
    variance = questions * (2 * rarer + center * (1 - center))
    excess = gained - lost - questions * center
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Holm 1979), in the given order.

    Rejecting adjusted p-values below 5% keeps the family-wise error rate below 5%, however
    the tests depend on each other.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.zeros(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, factors * np.array(p_values)[order]))
    return list(map(float, adjusted))


def not_worse(gained: int, lost: int, questions: int, margin: float) -> float:
    """Return the one-sided p-value for a drop of at least `margin` (non-inferiority, Tango 1998).

    The margin is a share of the questions, between 0 and 1.
    """
    return float(stats.norm.sf(paired_score(gained, lost, questions, -margin)))


def questions_for_retention(discordant: float, margin: float) -> int:
    """Return how many questions show with 80% power that an unchanged accuracy is not worse.

    A drop of `margin` is accepted.
    """
    errors = float(stats.norm.isf(ALPHA) + stats.norm.ppf(POWER))
    return math.ceil(discordant * (errors / margin) ** 2)


def power_of_retention(questions: int, discordant: float, margin: float) -> float:
    """Return the probability that an unchanged accuracy is shown to be not worse."""
    errors = margin * math.sqrt(questions / discordant)
    return float(stats.norm.cdf(errors - stats.norm.isf(ALPHA)))


def mcnemar_power(
    questions: int, discordant: float, difference: float, level: float = ALPHA
) -> float:
    """Return the probability that the exact McNemar test detects a change of accuracy.

    The sum is exact: the number m of discordant questions is binomial, the gained ones among
    them are binomial with (discordant + difference) / (2 discordant), and the test's critical
    value is looked up for each m (Duffy 1984, Biometrics 40:1005).

    Args:
        questions: number of questions both models answer.
        discordant: above 0.
        difference: of the accuracies, at most `discordant`.
        level: of the two-sided test.
    """
    changed = np.arange(questions + 1)
    weights = stats.binom.pmf(changed, questions, discordant)
    likely = weights > _NEGLIGIBLE
    changed, weights = changed[likely], weights[likely]
    # The largest count of the rarer kind with p below the level; -1 where there is none.
    critical = stats.binom.ppf(level / 2, changed, 0.5) - 1
    gained = (discordant + difference) / (2 * discordant)
    detected = stats.binom.cdf(critical, changed, gained) + stats.binom.cdf(
        critical, changed, 1 - gained
    )
    return float(weights @ detected)


def minimum_detectable_effect(
    questions: int, discordant: float, level: float = ALPHA
) -> float | None:
    """Return the smallest change of accuracy that McNemar's test detects with 80% power.

    With 100 questions and 20% of them discordant it is 0.128; with 4,183 it is 0.020.

    Args:
        questions: number of questions both models answer.
        discordant: as observed, or `WORST_DISCORDANCE` before that. A change larger than this
            share counts as all gains.
        level: of the two-sided test.

    Returns:
        The difference as a share of the questions; None if there are too few for any.
    """

    def power(difference: float) -> float:
        return mcnemar_power(questions, max(discordant, difference), difference, level)

    low, high = 0.0, 1.0
    if power(high) < POWER:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def detectable_mean(differences: Sequence[float], level: float = ALPHA) -> float | None:
    """Return the smallest mean difference that a paired test detects with 80% power.

    By the normal approximation, from the spread of the differences. None below `MIN_ITEMS` items.
    """
    if len(differences) < MIN_ITEMS:
        return None
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return error * detectable_errors(level)


def detectable_errors(level: float) -> float:
    """Return the minimum detectable effect in standard errors."""
    return float(stats.norm.isf(level / 2) + stats.norm.ppf(POWER))
