"""From predictions to accuracies: each with its interval, beside chance and the majority letter."""

from collections import Counter
from collections.abc import Mapping, Sequence

from job.evals.paired import compare_shares
from job.evals.predictions import ChoiceLine, answered
from job.evals.stats import (
    UNRELATED,
    detectable,
    share,
    wilson,
)
from job.results import Comparison, GroupScore, ModelScore, MultipleChoice, Share
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
    first, second = (
        {identity: line.correct for identity, line in answered(lines).items()}
        for lines in (before, after)
    )
    return compare_shares(a, b, first, second, samples, seed)


def groups(models: Mapping[str, Sequence[ChoiceLine]]) -> list[GroupScore]:
    """Each model by what the questions are grouped by, the largest group first."""
    names = Counter(line.group for line in models["baseline"] if line.group is not None)
    return [
        GroupScore(name=name, questions=count, models=_group(name, models))
        for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0]))
    ]


def _group(name: str, models: Mapping[str, Sequence[ChoiceLine]]) -> dict[str, Share]:
    found = {}
    for model, lines in models.items():
        given = [line.correct for line in answered(lines).values() if line.group == name]
        found[model] = share(sum(given), len(given))
    return found


def summarise(
    entry: Entry,
    revision: str | None,
    models: Mapping[str, Sequence[ChoiceLine]],
    samples: int,
    seed: int,
    in_training_text: int | None = None,
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
        few_shot=0 if entry.few_shot is None else entry.few_shot.examples,
        in_training_text=in_training_text,
        chance=1 / len(asked[0].options),
        majority_letter=majority,
        majority_accuracy=count / len(asked),
        detectable_at_worst=detectable(len(asked), UNRELATED),
        models={name: score(lines) for name, lines in models.items()},
        comparisons=[comparison for comparison in found if comparison is not None],
        grouped_by=entry.group,
        groups=groups(models),
    )
