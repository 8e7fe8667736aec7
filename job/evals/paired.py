"""Two models on the same items, each of which comes out one way or the other."""

from collections.abc import Mapping

from job.evals.stats import bootstrap, detectable, finding_of_test, mcnemar
from job.results import Comparison


def compare_shares(
    a: str,
    b: str,
    before: Mapping[str, bool],
    after: Mapping[str, bool],
    samples: int,
    seed: int,
) -> Comparison | None:
    """Model `b` against model `a`, on the items both have; None if there are none.

    As if it were the only test; `job.evals.family` corrects for the others.
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
        detectable=detectable(len(shared), (gained + lost) / len(shared)),
    )
