"""Confidence intervals, paired tests, power, and the correction for multiple tests.

scipy does the arithmetic where it can. Intervals are 95%; tests are two-sided at the 5% level.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from job.results import Comparison, Estimate, Finding, Interval, PairedTest, Record, Share

ALPHA = 0.05
POWER = 0.8
"""Probability that a test detects a change of its minimum detectable effect."""

MIN_BOOTSTRAP_ITEMS = 10
"""With fewer items the bootstrap interval is too unreliable to claim a change."""

WORST_DISCORDANCE = 0.5
"""Share of questions that exactly one of two unrelated models gets right.

It is p(1-q) + q(1-p) for accuracies p and q, at most 1/2 unless one model avoids what the other
gets right. This is the assumption before anything is measured.
"""

_MAX_RANDOM_NUMBERS = 4_000_000
"""Random numbers the bootstrap holds in memory."""

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
    """Return the two-sided p-value of the exact McNemar test (McNemar 1947).

    Args:
        gained: questions only the second model got right.
        lost: questions only the first model got right.
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def bootstrap_mean(values: Sequence[float], bootstrap: Bootstrap) -> Estimate:
    """Return the mean and its percentile bootstrap interval (Efron 1979).

    Pass differences of pairs for the paired bootstrap.

    Args:
        values: one per item; not empty.
    """
    array = np.asarray(values, dtype=np.float64)
    return _estimate(array, _resampled_means(array, bootstrap))


def bootstrap_test(differences: Sequence[float], bootstrap: Bootstrap) -> tuple[Estimate, float]:
    """Return the mean difference with its interval, and the p-value for a mean of 0.

    The p-value inverts the interval (Efron and Tibshirani 1993, section 15.4): twice the share
    of resampled means on the other side of 0, and at least 2 / (samples + 1). It is 1 with
    fewer than `MIN_BOOTSTRAP_ITEMS` items.

    Args:
        differences: one per pair; not empty.
    """
    array = np.asarray(differences, dtype=np.float64)
    means = _resampled_means(array, bootstrap)
    if len(array) < MIN_BOOTSTRAP_ITEMS:
        return _estimate(array, means), 1.0
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (1 + int(tail)) / (1 + bootstrap.samples))
    return _estimate(array, means), p_value


def _resampled_means(array: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    generator = np.random.default_rng(bootstrap.seed)
    means = []
    chunk = max(1, _MAX_RANDOM_NUMBERS // len(array))
    for start in range(0, bootstrap.samples, chunk):
        count = min(chunk, bootstrap.samples - start)
        indices = generator.integers(0, len(array), size=(count, len(array)))
        means.append(array[indices].mean(axis=1))
    return np.concatenate(means)


def _estimate(array: np.ndarray, means: np.ndarray) -> Estimate:
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(mean=float(array.mean()), ci95=(float(low), float(high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Holm 1979), in the given order.

    Rejecting adjusted p-values below 5% keeps the family-wise error rate below 5%, however
    the tests depend on each other.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def mcnemar_power(questions: int, discordant: float, difference: float) -> float:
    """Return the probability that the exact McNemar test detects a change of accuracy.

    The sum is exact: the number m of discordant questions is binomial, the gained ones among
    them are binomial with (discordant + difference) / (2 discordant), and the test's critical
    value is looked up for each m (Duffy 1984, Biometrics 40:1005).

    Args:
        questions: number of questions both models answer.
        discordant: share of them that only one model gets right; above 0.
        difference: of the accuracies, at most `discordant`.
    """
    changed = np.arange(questions + 1)
    weights = stats.binom.pmf(changed, questions, discordant)
    likely = weights > _NEGLIGIBLE
    changed, weights = changed[likely], weights[likely]
    # The largest count of the rarer kind with p below 5%; -1 where there is none.
    critical = stats.binom.ppf(ALPHA / 2, changed, 0.5) - 1
    gained = (discordant + difference) / (2 * discordant)
    detected = stats.binom.cdf(critical, changed, gained) + stats.binom.cdf(
        critical, changed, 1 - gained
    )
    return float(weights @ detected)


def minimum_detectable_effect(questions: int, discordant: float) -> float | None:
    """Return the smallest change of accuracy that McNemar's test detects with 80% power.

    With 100 questions and 20% of them discordant it is 0.128; with 4,183 it is 0.020.

    Args:
        questions: number of questions both models answer.
        discordant: share of them that only one model gets right, as observed, or
            `WORST_DISCORDANCE` before that. A change larger than this share counts as all gains.

    Returns:
        The difference as a share of the questions; None if there are too few for any.
    """

    def power(difference: float) -> float:
        return mcnemar_power(questions, max(discordant, difference), difference)

    low, high = 0.0, 1.0
    if power(high) < POWER:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def finding_of_test(difference: float, p_value: float) -> Finding:
    """Return the finding of a paired test at the 5% level."""
    if p_value >= ALPHA or difference == 0:
        return "no measurable change"
    return "improved" if difference > 0 else "worse"


def finding_of_interval(interval: Interval, items: int) -> Finding:
    """Return the finding of a paired difference's bootstrap interval: a change if it excludes 0.

    With fewer than `MIN_BOOTSTRAP_ITEMS` items no change is claimed.
    """
    if items < MIN_BOOTSTRAP_ITEMS:
        return "no measurable change"
    low, high = interval
    if low > 0:
        return "improved"
    return "worse" if high < 0 else "no measurable change"


def compare_proportions(
    models: tuple[str, str],
    before: Mapping[str, bool],
    after: Mapping[str, bool],
    bootstrap: Bootstrap,
) -> Comparison | None:
    """Compare two models by McNemar's test on the items both have; None if there are none.

    `p_holm` is still the plain p-value; `apply_holm` sets it for all tests of a record.

    Args:
        models: names of the models that gave `before` and `after`.
        before: success by item id, of the first model.
        after: success by item id, of the second model.
    """
    shared = [identity for identity in before if identity in after]
    if not shared:
        return None
    changes = [int(after[i]) - int(before[i]) for i in shared]
    gained, lost = changes.count(1), changes.count(-1)
    estimate = bootstrap_mean(changes, bootstrap)
    p_value = mcnemar(gained, lost)
    return Comparison(
        a=models[0],
        b=models[1],
        questions=len(shared),
        gained=gained,
        lost=lost,
        difference=estimate.mean,
        ci95=estimate.ci95,
        p_value=p_value,
        p_holm=p_value,
        finding=finding_of_test(estimate.mean, p_value),
        detectable=minimum_detectable_effect(len(shared), (gained + lost) / len(shared)),
    )


def paired_tests(record: Record) -> list[PairedTest]:
    """Return all tests nested in a record, in the order of its fields."""
    tests: list[PairedTest] = []

    def collect(test: PairedTest) -> PairedTest:
        tests.append(test)
        return test

    _map_tests(record, collect)
    return tests


def apply_holm[R: Record](record: R) -> R:
    """Return a record whose tests have `p_holm` and `finding` adjusted for all tests in it."""
    adjusted = iter(holm([test.p_value for test in paired_tests(record)]))

    def adjust(test: PairedTest) -> PairedTest:
        p_holm = next(adjusted)
        # The correction only removes findings.
        finding = test.finding if p_holm < ALPHA else "no measurable change"
        return test.model_copy(update={"p_holm": p_holm, "finding": finding})

    changed: R = _map_tests(record, adjust)
    return changed


def _map_tests(value: Any, change: Callable[[PairedTest], PairedTest]) -> Any:
    if isinstance(value, PairedTest):
        return change(value)
    if isinstance(value, Record):
        names = type(value).model_fields
        return value.model_copy(
            update={name: _map_tests(getattr(value, name), change) for name in names}
        )
    if isinstance(value, dict):
        return {key: _map_tests(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_tests(item, change) for item in value]
    return value
