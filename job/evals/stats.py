"""Intervals and paired tests: how sure a number is, and whether two differ.

scipy does the arithmetic where it has it. All intervals are 95 %.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from job.results import Estimate, Finding, Interval

ALPHA = 0.05
FEWEST = 10
"""Items below which a bootstrap interval shows no finding."""
_BLOCK = 4_000_000
"""Random numbers drawn at once by the bootstrap."""


def wilson(successes: int, trials: int) -> Interval:
    """The Wilson score interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return (0.0, 1.0)
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return (float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test for paired answers (McNemar 1947).

    Args:
        gained: questions that only the second model got right.
        lost: questions that only the first model got right.
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def bootstrap(values: Sequence[float], samples: int, seed: int) -> Estimate:
    """The mean and its percentile bootstrap interval (Efron 1979).

    Differences of pairs give the paired bootstrap.

    Args:
        values: one value an item; must not be empty.
        samples: resamples to draw.
        seed: the same seed gives the same interval.
    """
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, _BLOCK // len(array))
    for start in range(0, samples, block):
        drawn = min(block, samples - start)
        chosen = generator.integers(0, len(array), size=(drawn, len(array)))
        means.append(array[chosen].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Estimate(mean=float(array.mean()), ci95=(float(low), float(high)))


def finding_of_test(difference: float, p_value: float) -> Finding:
    """What a paired test shows at the 5 % level."""
    if p_value >= ALPHA or difference == 0:
        return "no measurable change"
    return "improved" if difference > 0 else "worse"


def finding_of_interval(interval: Interval, items: int) -> Finding:
    """What the bootstrap interval of a paired difference shows: a change if 0 lies outside.

    Of fewer than 10 items the bootstrap knows too little to tell a change from chance.
    """
    if items < FEWEST:
        return "no measurable change"
    low, high = interval
    if low > 0:
        return "improved"
    return "worse" if high < 0 else "no measurable change"
