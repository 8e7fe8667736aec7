"""Metrics over predictions: accuracy, ROUGE and style traits, with intervals and baselines.

Three sections: multiple choice (accuracy against chance and the majority letter), dialogue
(ROUGE against trivial baselines), and style traits (share of answers that use certain phrases).
Comparisons between models are paired, on the items both models answered.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from job.chat.thoughts import split_thoughts
from job.data.examples import Example
from job.data.words import split_words
from job.evals.predictions import ChoiceLine, DialogueLine, answered
from job.evals.statistics import (
    WORST_DISCORDANCE,
    Bootstrap,
    bootstrap_mean,
    bootstrap_test,
    compare_proportions,
    finding_of_interval,
    minimum_detectable_effect,
    proportion,
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
from job.spec.schema import MultipleChoiceEval

COMPARED_MODELS = (("baseline", "finetuned"), ("finetuned", "reference"))


# Multiple choice


def score_choices(lines: Sequence[ChoiceLine]) -> ModelScore:
    """Score one model on one task. An unparsed answer is wrong; a missing one is not counted."""
    answers = answered(lines).values()
    correct = sum(line.correct for line in answers)
    letters = Counter(line.choice for line in answers if line.choice is not None)
    return ModelScore(
        correct=correct,
        unparsed=sum(line.choice is None for line in answers),
        truncated=sum(line.finish == "length" for line in answers),
        cut_in_thoughts=_cut_in_thoughts(answers),
        missing=len(lines) - len(answers),
        accuracy=correct / len(answers) if answers else 0.0,
        ci95=wilson(correct, len(answers)),
        letters=dict(sorted(letters.items())),
    )


def _cut_in_thoughts(lines: Iterable[ChoiceLine | DialogueLine]) -> int:
    return sum(bool(n.thoughts) and not n.answer and n.finish == "length" for n in lines)


def compare_choices(
    models: tuple[str, str],
    before: Sequence[ChoiceLine],
    after: Sequence[ChoiceLine],
    bootstrap: Bootstrap,
) -> Comparison | None:
    """Compare two models on the questions both answered; None if there are none.

    The p-value is not adjusted for other tests; see `statistics.apply_holm`.

    Args:
        models: names of the models that gave `before` and `after`.
    """
    first, second = (
        {identity: line.correct for identity, line in answered(lines).items()}
        for lines in (before, after)
    )
    return compare_proportions(models, first, second, bootstrap)


def group_scores(models: Mapping[str, Sequence[ChoiceLine]]) -> list[GroupScore]:
    """Return each model's accuracy by group of questions, the largest group first."""
    sizes = Counter(line.group for line in models["baseline"] if line.group is not None)
    return [
        GroupScore(
            name=name,
            questions=count,
            models={model: _group_accuracy(name, lines) for model, lines in models.items()},
        )
        for name, count in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]


def _group_accuracy(group: str, lines: Sequence[ChoiceLine]) -> Share:
    correct = [line.correct for line in answered(lines).values() if line.group == group]
    return proportion(sum(correct), len(correct))


def summarize_choices(
    entry: MultipleChoiceEval,
    models: Mapping[str, Sequence[ChoiceLine]],
    bootstrap: Bootstrap,
    revision: str | None = None,
    in_training_text: int | None = None,
) -> MultipleChoiceResult:
    """Summarize one task: every model's accuracy, the trivial baselines and the paired tests.

    Args:
        entry: the task's section of the spec.
        models: predictions by model; "baseline" is required.
        bootstrap: settings of the intervals of differences.
        revision: commit of the dataset, where it has one.
        in_training_text: number of questions that overlap the training text, if known.
    """
    questions = models["baseline"]
    majority, count = Counter(line.gold for line in questions).most_common(1)[0]
    comparisons = [
        compare_choices((a, b), models[a], models[b], bootstrap)
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
        in_training_text=in_training_text,
        chance=fmean(1 / len(line.options) for line in questions),
        majority_letter=majority,
        majority_accuracy=count / len(questions),
        detectable_at_worst=minimum_detectable_effect(len(questions), WORST_DISCORDANCE),
        models={name: score_choices(lines) for name, lines in models.items()},
        comparisons=[comparison for comparison in comparisons if comparison is not None],
        grouped_by=entry.group,
        groups=group_scores(models),
    )


# Dialogue


ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
CONSTANT_ANSWER = (
    "Thank you for your question. I understand your concern. Please consult a professional who "
    "can look at this with you, and do not hesitate to ask if you need anything else."
)
"""A polite sentence that fits any question: a trivial baseline."""


class _RougeTokenizer:
    """Splits text of any script into words; those of English as ROUGE does, without endings."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the words in lower case."""
        return [
            part
            for word in split_words(text.lower())
            for part in (self._english.tokenize(word) if word.isascii() else [word])
        ]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE_METRICS, tokenizer=_RougeTokenizer())


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def overlap_scores(expected: str, answer: str) -> dict[str, float]:
    """Return F-measures from 0 to 1 by metric.

    They are ROUGE of words (Lin 2004), and `chrf` of characters (Popović 2015).
    """
    expected = split_thoughts(expected)[1] or expected
    rouge = _rouge_scorer().score(expected, answer)
    scores = {name: float(rouge[name].fmeasure) for name in ROUGE_METRICS}
    scores["chrf"] = _chrf_scorer().sentence_score(answer, [expected]).score / 100
    return {name: round(score, 6) for name, score in scores.items()}


def dialogue_line(example: Example, answer: str, **rest: object) -> DialogueLine:
    """Return the scored line of an answer to a held-out prompt; `rest` are its further fields."""
    fields = {"id": example.id, "prompt": example.prompt, "expected": example.response}
    scores = overlap_scores(example.response, answer)
    return DialogueLine.model_validate({**fields, "answer": answer, **scores, **rest})


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
        truncated=sum(line.finish == "length" for line in answers),
        cut_in_thoughts=_cut_in_thoughts(answers),
        missing=len(lines) - len(answers),
    )


def compare_dialogues(
    models: tuple[str, str],
    before: Sequence[DialogueLine],
    after: Sequence[DialogueLine],
    bootstrap: Bootstrap,
) -> DialogueComparison | None:
    """Compare ROUGE-L on the prompts both models answered; None if there are none.

    The p-value is not adjusted for other tests; see `statistics.apply_holm`.

    Args:
        models: names of the models that gave `before` and `after`.
    """
    first, second = answered(before), answered(after)
    shared = [identity for identity in first if identity in second]
    if not shared:
        return None
    differences = [second[i].rougeL - first[i].rougeL for i in shared]
    estimate, p_value = bootstrap_test(differences, bootstrap)
    return DialogueComparison(
        a=models[0],
        b=models[1],
        examples=len(shared),
        difference=estimate.mean,
        ci95=estimate.ci95,
        p_value=p_value,
        p_holm=p_value,
        finding=finding_of_interval(estimate.ci95, len(shared)),
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


# Style traits


_NUMBER = r"\\d+(?:[.,]\\d+)*"


def phrase_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for any of the phrases: as words, in any case, `#` for a number."""
    return re.compile("|".join(_phrase_regex(phrase) for phrase in phrases), re.IGNORECASE)


def _phrase_regex(phrase: str) -> str:
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase) else ""
    return before + re.sub(r"\\#", _NUMBER, words) + after


def summarize_style(
    traits: Mapping[str, Sequence[str]],
    models: Mapping[str, Sequence[DialogueLine]],
    bootstrap: Bootstrap,
) -> list[StyleTrait]:
    """Return how often each trait occurs in the expected answers and in each model's.

    Args:
        traits: phrases by trait; any of them shows it.
        models: predictions by model; "baseline" and "finetuned" are required and compared.
        bootstrap: settings of the intervals of differences.
    """
    return [
        _style_trait(name, phrase_pattern(phrases), models, bootstrap)
        for name, phrases in traits.items()
    ]


def _style_trait(
    name: str,
    pattern: re.Pattern[str],
    models: Mapping[str, Sequence[DialogueLine]],
    bootstrap: Bootstrap,
) -> StyleTrait:
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
            ("baseline", "finetuned"), by_model["baseline"], by_model["finetuned"], bootstrap
        ),
    )
