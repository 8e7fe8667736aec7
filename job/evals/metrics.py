"""From predictions to accuracies: each with its interval, beside chance and the majority letter."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from job.evals.predictions import ChoiceLine, DialogueLine, answered
from job.evals.statistics import (
    UNRELATED,
    bootstrap,
    bootstrap_test,
    compare_shares,
    finding_of_interval,
    minimum_detectable_effect,
    share,
    wilson,
)
from job.results import (
    Comparison,
    DialogueComparison,
    DialogueScore,
    GroupScore,
    ModelScore,
    MultipleChoiceResult,
    Share,
    StyleTrait,
    TrivialBaselines,
)
from job.spec.schema import MultipleChoiceEval as Entry


def score_choices(lines: Sequence[ChoiceLine]) -> ModelScore:
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


def compare_choices(
    a: str,
    b: str,
    before: Sequence[ChoiceLine],
    after: Sequence[ChoiceLine],
    samples: int,
    seed: int,
) -> Comparison | None:
    """Model `b` against model `a`, on the questions both answered; None if there are none.

    As if it were the only test; `job.evals.statistics.corrected` corrects for the others.
    """
    first, second = (
        {identity: line.correct for identity, line in answered(lines).items()}
        for lines in (before, after)
    )
    return compare_shares(a, b, first, second, samples, seed)


def group_scores(models: Mapping[str, Sequence[ChoiceLine]]) -> list[GroupScore]:
    """Each model by what the questions are grouped by, the largest group first."""
    names = Counter(line.group for line in models["baseline"] if line.group is not None)
    return [
        GroupScore(name=name, questions=count, models=_group_shares(name, models))
        for name, count in sorted(names.items(), key=lambda item: (-item[1], item[0]))
    ]


def _group_shares(name: str, models: Mapping[str, Sequence[ChoiceLine]]) -> dict[str, Share]:
    found = {}
    for model, lines in models.items():
        given = [line.correct for line in answered(lines).values() if line.group == name]
        found[model] = share(sum(given), len(given))
    return found


def summarize_choices(
    entry: Entry,
    revision: str | None,
    models: Mapping[str, Sequence[ChoiceLine]],
    samples: int,
    seed: int,
    in_training_text: int | None = None,
) -> MultipleChoiceResult:
    """All models on one slice, compared in pairs with the tuned one."""
    asked = models["baseline"]
    majority, count = Counter(line.gold for line in asked).most_common(1)[0]
    pairs = [("baseline", "finetuned"), ("finetuned", "reference")]
    found = [
        compare_choices(a, b, models[a], models[b], samples, seed)
        for a, b in pairs
        if a in models and b in models
    ]
    return MultipleChoiceResult(
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
        detectable_at_worst=minimum_detectable_effect(len(asked), UNRELATED),
        models={name: score_choices(lines) for name, lines in models.items()},
        comparisons=[comparison for comparison in found if comparison is not None],
        grouped_by=entry.group,
        groups=group_scores(models),
    )


POLITE = (
    "Thank you for your question. I understand your concern. Please consult a professional who "
    "can look at this with you, and do not hesitate to ask if you need anything else."
)
"""An answer to everything."""


METRICS = ("rouge1", "rouge2", "rougeL")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(METRICS, use_stemmer=True)


def rouge_scores(expected: str, answer: str) -> dict[str, float]:
    """F-measures from 0 to 1 by metric. Only a-z and 0-9 count: other scripts score 0."""
    scores = _scorer().score(expected, answer)
    return {name: round(float(scores[name].fmeasure), 6) for name in METRICS}


def score_dialogues(lines: Sequence[DialogueLine], samples: int, seed: int) -> DialogueScore:
    """One model's scores with bootstrap intervals, over what it answered."""
    missing = len(lines)
    lines = list(answered(lines).values())
    estimates = {
        name: bootstrap([getattr(line, name) for line in lines], samples, seed) for name in METRICS
    }
    return DialogueScore(
        **estimates,
        mean_tokens=round(sum(line.tokens for line in lines) / len(lines), 2),
        truncated=sum(line.finish == "length" for line in lines),
        missing=missing - len(lines),
    )


def compare_dialogues(
    a: str,
    b: str,
    before: Sequence[DialogueLine],
    after: Sequence[DialogueLine],
    samples: int,
    seed: int,
) -> DialogueComparison | None:
    """The paired difference of ROUGE-L over the prompts that both answered; None without any.

    As if it were the only test; `job.evals.statistics.corrected` corrects for the others.
    """
    first, second = answered(before), answered(after)
    shared = [identity for identity in first if identity in second]
    if not shared:
        return None
    differences = [second[i].rougeL - first[i].rougeL for i in shared]
    found, p_value = bootstrap_test(differences, samples, seed)
    return DialogueComparison(
        a=a,
        b=b,
        examples=len(shared),
        difference=found.mean,
        ci95=found.ci95,
        p_value=p_value,
        p_holm=p_value,
        finding=finding_of_interval(found.ci95, len(shared)),
    )


def trivial_baselines(lines: Sequence[DialogueLine], samples: int, seed: int) -> TrivialBaselines:
    """ROUGE-L of answers that know nothing: the prompt echoed, the next example's answer, and one
    polite sentence for all."""
    echoed = [rouge_scores(line.expected, line.prompt)["rougeL"] for line in lines]
    rotated = [*lines[1:], lines[0]]
    others = [
        rouge_scores(line.expected, other.expected)["rougeL"]
        for line, other in zip(lines, rotated, strict=True)
    ]
    polite = [rouge_scores(line.expected, POLITE)["rougeL"] for line in lines]
    return TrivialBaselines(
        echoed_prompt=bootstrap(echoed, samples, seed),
        other_answer=bootstrap(others, samples, seed),
        polite_sentence=bootstrap(polite, samples, seed),
    )


_NUMBER = r"\\d+(?:[.,]\\d+)*"


def pattern_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """What matches where any of the phrases stands: whole words, any case, `#` for a number."""
    return re.compile("|".join(_pattern(phrase) for phrase in phrases), re.IGNORECASE)


def _pattern(phrase: str) -> str:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return before + re.sub(r"\\#", _NUMBER, words) + after


def summarize_style(
    markers: Mapping[str, Sequence[str]],
    models: Mapping[str, Sequence[DialogueLine]],
    samples: int,
    seed: int,
) -> list[StyleTrait]:
    """How often each trait shows in the expected answers and in each model's, compared in pairs."""
    return [
        _marker(name, pattern_of(phrases), models, samples, seed)
        for name, phrases in markers.items()
    ]


def _marker(
    name: str,
    pattern: re.Pattern[str],
    models: Mapping[str, Sequence[DialogueLine]],
    samples: int,
    seed: int,
) -> StyleTrait:
    def shows(text: str) -> bool:
        return pattern.search(text.replace("’", "'")) is not None

    found = {
        model: {line.id: shows(line.answer) for line in answered(lines).values()}
        for model, lines in models.items()
    }
    expected = {line.id: shows(line.expected) for line in models["baseline"]}
    return StyleTrait(
        name=name,
        expected=_style_share(expected),
        models={model: _style_share(shown) for model, shown in found.items()},
        comparison=compare_shares(
            "baseline", "finetuned", found["baseline"], found["finetuned"], samples, seed
        ),
    )


def _style_share(shown: Mapping[str, bool]) -> Share:
    return share(sum(shown.values()), len(shown))
