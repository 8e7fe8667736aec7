"""Two models compared on the same items: the tests, their families, and what they found."""

from collections.abc import Iterator, Mapping
from typing import Literal

from job.evals.statistics import (
    ALPHA,
    MIN_ITEMS,
    Bootstrap,
    detectable_errors,
    detectable_mean,
    holm,
    mcnemar,
    minimum_detectable_effect,
    not_worse,
    paired_interval,
    sign_flip_test,
)
from job.scores import Comparison, Finding, MeanComparison, Record

Family = Literal["primary", "retention", "judge", "secondary"]
type Test = Comparison | MeanComparison


def compare_proportions(
    models: tuple[str, str],
    before: Mapping[str, float],
    after: Mapping[str, float],
    family: Family,
    margin: float | None = None,
) -> Comparison | None:
    """Compare two models by McNemar's test on the items both have; None if there are none.

    `decide_findings` corrects it for the other tests of its family.

    Args:
        models: their names.
        before: 1 for success, otherwise 0, by item id.
        after: as `before`.
        family: of tests.
        margin: drop that a retention task accepts.
    """
    shared = [identity for identity in before if identity in after]
    if not shared:
        return None
    changes = [int(after[i]) - int(before[i]) for i in shared]
    gained, lost = changes.count(1), changes.count(-1)
    p_value = mcnemar(gained, lost)
    return Comparison(
        a=models[0],
        b=models[1],
        family=family,
        questions=len(shared),
        gained=gained,
        lost=lost,
        difference=(gained - lost) / len(shared),
        ci95=paired_interval(gained, lost, len(shared)),
        p_value=p_value,
        p_holm=p_value,
        finding="no measurable change",
        margin=margin,
        p_not_worse=None if margin is None else not_worse(gained, lost, len(shared), margin),
    )


def compare_means[T: MeanComparison](
    kind: type[T],
    models: tuple[str, str],
    before: Mapping[str, float],
    after: Mapping[str, float],
    bootstrap: Bootstrap,
    family: Family,
    margin: float | None = None,
) -> T | None:
    """Compare the means of two models by a sign-flip test on the items both have.

    The arguments are those of `compare_proportions`, and the `kind` of record to return.
    """
    shared = [identity for identity in before if identity in after]
    if not shared:
        return None
    differences = [after[i] - before[i] for i in shared]
    estimate, p_value = sign_flip_test(differences, bootstrap)
    above = None
    if margin is not None:
        _, above = sign_flip_test([value + margin for value in differences], bootstrap)
        above = above / 2 if estimate.mean > -margin else 1 - above / 2
    return kind(
        a=models[0],
        b=models[1],
        family=family,
        examples=len(shared),
        difference=estimate.mean,
        ci95=estimate.ci95,
        p_value=p_value,
        p_holm=p_value,
        finding="no measurable change",
        detectable=detectable_mean(differences),
        margin=margin,
        p_not_worse=above,
    )


def paired_tests(part: object) -> Iterator[Test]:
    """Yield all tests nested in a record or a part of it, in the order of its fields."""
    if isinstance(part, Comparison | MeanComparison):
        yield part
    elif isinstance(part, Record):
        yield from paired_tests(dict(part))
    elif isinstance(part, dict | list):
        for item in part.values() if isinstance(part, dict) else part:
            yield from paired_tests(item)


def decide_findings[R: Record](record: R) -> R:
    """Return a record whose tests have their finding, corrected for all tests of their family.

    The primary family compares baseline and tuned model on target tasks and on the likeness and
    the loss of held-out answers: whether tuning helped does not depend on what else is measured.
    Each family has the 5% level. The minimum detectable effect is that of the level all its tests
    have at least.
    """
    decided = record.model_copy(deep=True)
    families: dict[str, list[Test]] = {}
    for test in paired_tests(decided):
        families.setdefault(test.family, []).append(test)
    for tests in families.values():
        level, corrected = ALPHA / len(tests), holm([test.p_value for test in tests])
        for test, p_holm in zip(tests, corrected, strict=True):
            detectable = test.detectable
            if isinstance(test, Comparison):
                share = (test.gained + test.lost) / test.questions
                detectable = minimum_detectable_effect(test.questions, share, level)
            elif detectable is not None:
                detectable *= detectable_errors(level) / detectable_errors(ALPHA)
            finding = _finding(test, p_holm, detectable)
            # Records are frozen, but nobody else has this copy yet.
            vars(test).update(p_holm=p_holm, finding=finding, detectable=detectable)
    return decided


def _finding(test: Test, p_holm: float, detectable: float | None) -> Finding:
    items = test.questions if isinstance(test, Comparison) else test.examples
    if test.p_not_worse is not None:
        # Each claim has its own level: "worse nowhere" needs all of them.
        if test.p_not_worse < ALPHA and items >= MIN_ITEMS:
            return "not worse"
        lower = p_holm < ALPHA and test.difference < 0 and items >= MIN_ITEMS
        return "worse" if lower else "cannot tell"
    # McNemar's test is exact with few items too.
    can_tell = isinstance(test, Comparison) or items >= MIN_ITEMS
    if can_tell and p_holm < ALPHA and test.difference:
        return "improved" if (test.difference > 0) != test.lower_is_better else "worse"
    if items < MIN_ITEMS or detectable is None:
        return "not enough evidence"
    return "no measurable change"
