"""ROUGE of answers against the expected ones (Lin 2004), by Google's rouge-score."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from job.evals.predictions import DialogueLine, answered
from job.evals.stats import bootstrap, bootstrap_test, finding_of_interval
from job.results import DialogueComparison, DialogueScore, Nulls

MOST_DIALOGUES = 200
"""Held-out examples answered where the spec says nothing."""

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


def summarise(lines: Sequence[DialogueLine], samples: int, seed: int) -> DialogueScore:
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


def compare(
    a: str,
    b: str,
    before: Sequence[DialogueLine],
    after: Sequence[DialogueLine],
    samples: int,
    seed: int,
) -> DialogueComparison | None:
    """The paired difference of ROUGE-L over the prompts that both answered; None without any.

    As if it were the only test; `job.evals.family` corrects for the others.
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


def nulls(lines: Sequence[DialogueLine], samples: int, seed: int) -> Nulls:
    """ROUGE-L of answers that know nothing: the prompt echoed, the next example's answer, and one
    polite sentence for all."""
    echoed = [rouge_scores(line.expected, line.prompt)["rougeL"] for line in lines]
    rotated = [*lines[1:], lines[0]]
    others = [
        rouge_scores(line.expected, other.expected)["rougeL"]
        for line, other in zip(lines, rotated, strict=True)
    ]
    polite = [rouge_scores(line.expected, POLITE)["rougeL"] for line in lines]
    return Nulls(
        echoed_prompt=bootstrap(echoed, samples, seed),
        other_answer=bootstrap(others, samples, seed),
        polite_sentence=bootstrap(polite, samples, seed),
    )
