"""From predictions to accuracies: each with its interval, beside chance and the majority letter."""

from collections import Counter
from collections.abc import Mapping, Sequence

from job.evals.predictions import ChoiceLine, answered
from job.evals.stats import (
    UNRELATED,
    bootstrap,
    detectable,
    finding_of_test,
    mcnemar,
    wilson,
)
from job.results import Comparison, ModelScore, MultipleChoice
from job.spec import MultipleChoice as Entry


def score(lines: Sequence[ChoiceLine]) -> ModelScore:
    """One model on one slice. An unparsed answer is wrong; a missing one is not counted."""
    given = answered(lines).values()
    correct = sum(line.correct for line in given)
    letters = Counter(line.choice for line in given if line.choice is not None)
    return ModelScore(
        correct=correct,
        unparsed=sum(line.choice is None for line in given),
        missing=len(lines) - len(given),
        accuracy=correct / len(given) if given else 0.0,
        ci95=wilson(correct, len(given)),
        letters=dict(sorted(letters.items())),
    )


def compare(
    a: str,
    b: str,
    before: Sequence[ChoiceLine],
    after: Sequence[ChoiceLine],
    samples: int,
    seed: int,
) -> Comparison | None:
    """Model `b` against model `a`, on the questions both answered; None if there are none.

    As if it were the only test; `job.evals.family` corrects for the others.
    """
    first, second = answered(before), answered(after)
    shared = [identity for identity in first if identity in second]
    if not shared:
        return None
    changes = [int(second[i].correct) - int(first[i].correct) for i in shared]
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


def summarise(
    entry: Entry,
    revision: str | None,
    models: Mapping[str, Sequence[ChoiceLine]],
    samples: int,
    seed: int,
) -> MultipleChoice:
    """All models on one slice, compared in pairs with the tuned one."""
    asked = models["baseline"]
    majority, count = Counter(line.gold for line in asked).most_common(1)[0]
    pairs = [("baseline", "finetuned"), ("finetuned", "reference")]
    found = [
        compare(a, b, models[a], models[b], samples, seed)
        for a, b in pairs
        if a in models and b in models
    ]
    return MultipleChoice(
        name=entry.name,
        scoring=entry.scoring,
        dataset=entry.dataset,
        revision=revision,
        questions=len(asked),
        chance=1 / len(asked[0].options),
        majority_letter=majority,
        majority_accuracy=count / len(asked),
        detectable_at_worst=detectable(len(asked), UNRELATED),
        models={name: score(lines) for name, lines in models.items()},
        comparisons=[comparison for comparison in found if comparison is not None],
    )
