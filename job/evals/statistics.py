"""Intervals and paired tests: how sure a number is, and whether two differ.

scipy does the arithmetic where it has it. All intervals are 95 %, and all tests two-sided at
the 5 % level.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from job.results import Comparison, Estimate, Finding, Interval, PairedTest, Record, Share

ALPHA = 0.05


FEWEST = 10
"""Items below which a bootstrap interval shows no finding."""


POWER = 0.8
"""How often a test should find a change of the size that it is said to be able to find."""


UNRELATED = 0.5
"""Share of questions whose correctness differs between two models that have nothing in common:
p(1-q) + q(1-p) for accuracies p and q, which is 1/2 at its largest unless one avoids what the
other gets right. What to expect at worst before anything is measured."""


_BLOCK = 4_000_000
"""Random numbers drawn at once by the bootstrap."""


_NEGLIGIBLE = 1e-12


def wilson(successes: int, trials: int) -> Interval:
    """The Wilson score interval of a proportion (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return (0.0, 1.0)
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return (float(interval.low), float(interval.high))


def share(count: int, of: int) -> Share:
    """So many out of so many, with the Wilson interval."""
    return Share(count=count, of=of, share=count / of if of else 0.0, ci95=wilson(count, of))


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
    return _estimate(array, _resampled_means(array, samples, seed))


def bootstrap_test(differences: Sequence[float], samples: int, seed: int) -> tuple[Estimate, float]:
    """The paired bootstrap: the mean difference with its interval, and a p-value for it being 0.

    The p-value is that of the interval (Efron and Tibshirani 1993, section 15.4): twice the
    share of resampled means on the other side of 0, and never below 2 / (samples + 1). Of fewer
    than 10 items the bootstrap knows too little to tell anything from chance: 1.

    Args:
        differences: one an item, as for `bootstrap`.
    """
    array = np.asarray(differences, dtype=np.float64)
    means = _resampled_means(array, samples, seed)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (1 + int(beyond)) / (1 + samples)) if len(array) >= FEWEST else 1.0
    return _estimate(array, means), p_value


def _resampled_means(array: np.ndarray, samples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, _BLOCK // len(array))
    for start in range(0, samples, block):
        drawn = min(block, samples - start)
        chosen = generator.integers(0, len(array), size=(drawn, len(array)))
        means.append(array[chosen].mean(axis=1))
    return np.concatenate(means)


def _estimate(array: np.ndarray, means: np.ndarray) -> Estimate:
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(mean=float(array.mean()), ci95=(float(low), float(high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for there being several tests (Holm 1979), in the order given.

    Below 5 % they keep the chance of any false finding among all the tests below 5 %,
    however the tests depend on each other.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = highest
    return corrected


def mcnemar_power(questions: int, discordant: float, difference: float) -> float:
    """How often the exact McNemar test finds a change of accuracy.

    Exact: the number m of questions whose correctness changes is binomial, of them those gained
    are binomial with (discordant + difference) / (2 discordant), and the test is looked up for
    each m (Duffy 1984, Biometrics 40:1005).

    Args:
        questions: asked of both models.
        discordant: share of them that only one model gets right; above 0.
        difference: of the accuracies, at most `discordant`.
    """
    changed = np.arange(questions + 1)
    weights = stats.binom.pmf(changed, questions, discordant)
    likely = weights > _NEGLIGIBLE
    changed, weights = changed[likely], weights[likely]
    # The most questions of the rarer kind with which p is still below 5 %; -1: none.
    most = stats.binom.ppf(ALPHA / 2, changed, 0.5) - 1
    gained = (discordant + difference) / (2 * discordant)
    found = stats.binom.cdf(most, changed, gained) + stats.binom.cdf(most, changed, 1 - gained)
    return float(weights @ found)


def minimum_detectable_effect(questions: int, discordant: float) -> float | None:
    """The smallest change of accuracy that the paired comparison finds four times in five.

    With 100 questions of which one in five changes sides it is 0.128, with 4,183 it is 0.020.

    Args:
        questions: asked of both models.
        discordant: share of them that only one model gets right, as it was observed, or
            `UNRELATED` before that. A larger change than this share needs more of them, and
            is taken to be all gains.

    Returns:
        The difference as a share of the questions; None where so few can show none.
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


def compare_shares(
    a: str,
    b: str,
    before: Mapping[str, bool],
    after: Mapping[str, bool],
    samples: int,
    seed: int,
) -> Comparison | None:
    """Model `b` against model `a`, on the items both have; None if there are none.

    As if it were the only test; `job.evals.statistics.corrected` corrects for the others.
    """
    shared = [identity for identity in before if identity in after]
    if not shared:
        return None
    changes = [int(after[i]) - int(before[i]) for i in shared]
    gained, lost = changes.count(1), changes.count(-1)
    estimate = bootstrap(changes, samples, seed)
    p_value = mcnemar(gained, lost)
    return Comparison(
        a=a,
        b=b,
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


Change = Callable[[PairedTest], PairedTest]


def paired_tests(record: Record) -> list[PairedTest]:
    """The tests in a record, in the order of its fields."""
    found: list[PairedTest] = []

    def note(test: PairedTest) -> PairedTest:
        found.append(test)
        return test

    _replaced(record, note)
    return found


def corrected[R: Record](record: R) -> R:
    """The same record with `p_holm` and `finding` of each test in it set for all of them."""
    values = iter(holm([test.p_value for test in paired_tests(record)]))

    def correct(test: PairedTest) -> PairedTest:
        p_holm = next(values)
        # A correction takes findings away and makes none.
        finding = test.finding if p_holm < ALPHA else "no measurable change"
        return test.model_copy(update={"p_holm": p_holm, "finding": finding})

    changed: R = _replaced(record, correct)
    return changed


def _replaced(value: Any, change: Change) -> Any:
    if isinstance(value, PairedTest):
        return change(value)
    if isinstance(value, Record):
        names = type(value).model_fields
        return value.model_copy(
            update={name: _replaced(getattr(value, name), change) for name in names}
        )
    if isinstance(value, dict):
        return {key: _replaced(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, change) for item in value]
    return value
