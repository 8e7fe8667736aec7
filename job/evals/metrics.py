"""Metrics over predictions, with intervals and baselines: accuracy, ROUGE, loss and style traits.

Comparisons between models are paired, on the items both models answered.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from job.chat.thoughts import split_thoughts
from job.evals.overlap import ROUGE_METRICS, overlap_scores
from job.evals.paired import Family, compare_means, compare_proportions
from job.evals.predictions import (
    ChoiceLine,
    DialogueLine,
    LossLine,
    TextLine,
    answered,
    scores_by_id,
)
from job.evals.statistics import (
    WORST_DISCORDANCE,
    Bootstrap,
    bootstrap_mean,
    minimum_detectable_effect,
    proportion,
    wilson,
)
from job.scores import (
    DialogueScore,
    GroupScore,
    HeldOutLoss,
    LossComparison,
    LossScore,
    ModelScore,
    MultipleChoiceResult,
    StyleTrait,
    TrivialBaselines,
)
from job.spec.evals import HarnessEval, TextEval
from job.spec.schema import MultipleChoiceEval

BEFORE_AFTER = ("baseline", "finetuned")
COMPARED_MODELS: tuple[tuple[str, str], ...] = (BEFORE_AFTER, ("finetuned", "reference"))


def family_and_margin(
    models: tuple[str, str], entry: MultipleChoiceEval | HarnessEval | TextEval | None = None
) -> tuple[Family, float | None]:
    """Return the family of a test, and the drop that it accepts if it is one of retention."""
    if "reference" in models:
        return "secondary", None
    if entry is not None and entry.role == "retention":
        return "retention", entry.margin
    return "primary", None


# Multiple choice


def score_choices(lines: Sequence[ChoiceLine]) -> ModelScore:
    """Score one model on one task. An unparsed answer is wrong; a missing one is not counted."""
    answers = answered(lines).values()
    correct = sum(line.correct for line in answers)
    letters = Counter(line.choice for line in answers if line.choice is not None)
    return ModelScore(
        correct=correct,
        unparsed=sum(line.choice is None for line in answers),
        **cut_and_missing(lines),
        accuracy=correct / len(answers) if answers else 0.0,
        ci95=wilson(correct, len(answers)),
        letters=dict(sorted(letters.items())),
    )


def cut_and_missing(lines: Sequence[ChoiceLine | DialogueLine | TextLine]) -> dict[str, int]:
    """Count the answers cut at the limit, those of them cut before they began, and missing ones."""
    answers = answered(lines).values()
    cut = [line for line in answers if line.finish == "length"]
    return {
        "truncated": len(cut),
        "cut_in_thoughts": sum(bool(line.thoughts) and not line.answer for line in cut),
        "missing": len(lines) - len(answers),
    }


def group_scores(models: Mapping[str, Sequence[ChoiceLine]]) -> list[GroupScore]:
    """Return each model's accuracy by group of questions, the largest group first."""
    sizes = Counter(line.group for line in models["baseline"] if line.group is not None)
    answers = {model: answered(lines).values() for model, lines in models.items()}
    scores = []
    for name, count in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        right = {
            model: [line.correct for line in lines if line.group == name]
            for model, lines in answers.items()
        }
        shares = {model: proportion(sum(each), len(each)) for model, each in right.items()}
        scores.append(GroupScore(name=name, questions=count, models=shares))
    return scores


def summarize_choices(
    entry: MultipleChoiceEval,
    models: Mapping[str, Sequence[ChoiceLine]],
    *,
    revision: str | None = None,
    **fields: Any,
) -> MultipleChoiceResult:
    """Summarize one task: the accuracy of every model, trivial baselines and paired tests.

    `models` has "baseline"; see `MultipleChoiceResult` for `revision` and further fields.
    """
    questions = models["baseline"]
    majority, count = Counter(line.gold for line in questions).most_common(1)[0]
    scores = {name: scores_by_id(lines) for name, lines in models.items()}
    comparisons = [
        compare_proportions((a, b), scores[a], scores[b], *family_and_margin((a, b), entry))
        for a, b in COMPARED_MODELS
        if a in models and b in models
    ]
    return MultipleChoiceResult(
        name=entry.name,
        scoring=entry.scoring,
        dataset=entry.dataset,
        revision=revision,
        questions=len(questions),
        few_shot=0 if entry.few_shot is None else entry.few_shot.examples,
        chance=fmean(1 / len(line.options) for line in questions),
        majority_letter=majority,
        majority_accuracy=count / len(questions),
        detectable_at_worst=minimum_detectable_effect(len(questions), WORST_DISCORDANCE),
        models={name: score_choices(lines) for name, lines in models.items()},
        comparisons=[comparison for comparison in comparisons if comparison is not None],
        grouped_by=entry.group,
        groups=group_scores(models),
        **fields,
    )


# Dialogue


CONSTANT_ANSWER = (
    "Thank you for your question. I understand your concern. Please consult a professional who "
    "can look at this with you, and do not hesitate to ask if you need anything else."
)
"""A polite sentence that fits any question: a trivial baseline."""


def score_dialogues(lines: Sequence[DialogueLine], bootstrap: Bootstrap) -> DialogueScore:
    """Score one model over the prompts it answered, with bootstrap intervals."""
    answers = list(answered(lines).values())
    estimates = {
        name: bootstrap_mean([getattr(line, name) for line in answers], bootstrap)
        for name in (*ROUGE_METRICS, "chrf")
    }
    return DialogueScore(
        **estimates,
        mean_tokens=round(sum(line.tokens for line in answers) / len(answers), 2),
        **cut_and_missing(lines),
    )


def trivial_baselines(
    lines: Sequence[DialogueLine], bootstrap: Bootstrap
) -> dict[str, TrivialBaselines]:
    """Return `rougeL` and `chrf` of answers that need no model.

    They are the echoed prompt, a shuffled answer (the next example's), and a constant sentence.
    """
    answers = {
        "echoed_prompt": [line.prompt for line in lines],
        "other_answer": [line.expected for line in (*lines[1:], *lines[:1])],
        "polite_sentence": [CONSTANT_ANSWER] * len(lines),
    }
    scores = {
        name: [overlap_scores(line.expected, text) for line, text in zip(lines, texts, strict=True)]
        for name, texts in answers.items()
    }
    return {
        metric: TrivialBaselines.model_validate(
            {
                name: bootstrap_mean([score[metric] for score in each], bootstrap)
                for name, each in scores.items()
            }
        )
        for metric in ("rougeL", "chrf")
    }


# Loss


def summarize_loss(
    models: Mapping[str, Sequence[LossLine]], bootstrap: Bootstrap
) -> HeldOutLoss | None:
    """Summarize the losses of "baseline" and "finetuned" on the same responses, if any."""
    means = {name: scores_by_id(lines) for name, lines in models.items()}
    before, after = (means[name] for name in BEFORE_AFTER)
    comparison = compare_means(LossComparison, BEFORE_AFTER, before, after, bootstrap, "primary")
    if comparison is None:
        return None
    tokens = {name: sum(line.tokens for line in lines) for name, lines in models.items()}
    return HeldOutLoss(
        examples=len(before),
        tokens=tokens["baseline"],
        models={
            name: LossScore(
                mean=sum(line.nats for line in lines) / tokens[name],
                by_example=bootstrap_mean(list(means[name].values()), bootstrap),
            )
            for name, lines in models.items()
        },
        lower=proportion(sum(after[i] < before[i] for i in before), len(before)),
        comparison=comparison,
    )


# Style traits


_NUMBER = r"\\d+(?:[.,]\\d+)*"


def phrase_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for any of the phrases: as words, in any case, `#` for a number."""
    patterns = []
    for phrase in phrases:
        words = r"\s+".join(re.escape(word) for word in phrase.split())
        before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
        after = r"(?!\w)" if re.search(r"\w$", phrase) else ""
        patterns.append(before + re.sub(r"\\#", _NUMBER, words) + after)
    return re.compile("|".join(patterns), re.IGNORECASE)


def summarize_style(
    traits: Mapping[str, Sequence[str]], models: Mapping[str, Sequence[DialogueLine]]
) -> list[StyleTrait]:
    """Return how often any phrase of each trait occurs in the expected answers and each model's.

    "baseline" and "finetuned" are compared.
    """
    return [_style_trait(name, phrases, models) for name, phrases in traits.items()]


def _style_trait(
    name: str, phrases: Sequence[str], models: Mapping[str, Sequence[DialogueLine]]
) -> StyleTrait:
    pattern = phrase_pattern(phrases)

    def matches(text: str) -> bool:
        text = split_thoughts(text)[1] or text
        return pattern.search(text.replace("’", "'")) is not None

    by_model = {
        model: {line.id: matches(line.answer) for line in answered(lines).values()}
        for model, lines in models.items()
    }
    expected = [matches(line.expected) for line in models["baseline"]]
    return StyleTrait(
        name=name,
        expected=proportion(sum(expected), len(expected)),
        models={
            model: proportion(sum(shown.values()), len(shown)) for model, shown in by_model.items()
        },
        comparison=compare_proportions(
            BEFORE_AFTER, by_model["baseline"], by_model["finetuned"], "secondary"
        ),
    )
