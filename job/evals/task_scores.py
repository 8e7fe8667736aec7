"""Scores of tasks with free answers, and of those of lm-evaluation-harness."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from job.evals.metrics import BEFORE_AFTER, cut_and_missing, family_and_margin
from job.evals.paired import compare_means, compare_proportions
from job.evals.predictions import HarnessLine, ScoredLine, TextLine, answered, scores_by_id
from job.evals.statistics import Bootstrap, bootstrap_mean, proportion
from job.evals.text_metrics import READING, Answer, Metric, json_fields
from job.scores import (
    Comparison,
    Estimate,
    HarnessResult,
    MeanComparison,
    RowCounts,
    Share,
    TextScore,
    TextTaskResult,
)
from job.spec.evals import HarnessEval, TextEval

GRADUAL = ("f1", "json", "rouge", "chrf")
"""Metrics of `evals.tasks` between 0 and 1."""


def compare_scores(
    models: tuple[str, str],
    before: Sequence[ScoredLine],
    after: Sequence[ScoredLine],
    bootstrap: Bootstrap,
    entry: HarnessEval | TextEval | None = None,
    metric: str | None = None,
) -> Comparison | MeanComparison | None:
    """Compare two models on the items both answered; scores that can only be 0 or 1 as accuracies.

    The metric is that of the task's section of the spec, or `metric`.
    """
    first, second = scores_by_id(before), scores_by_id(after)
    family, margin = family_and_margin(models, entry)
    metric = entry.metric if entry else metric
    if metric not in GRADUAL and {*first.values(), *second.values()} <= {0.0, 1.0}:
        right = [{i: score == 1 for i, score in each.items()} for each in (first, second)]
        return compare_proportions(models, right[0], right[1], family, margin)
    return compare_means(MeanComparison, models, first, second, bootstrap, family, margin)


def summarize_harness(
    entry: HarnessEval,
    models: Mapping[str, Sequence[HarnessLine]],
    truncated: int,
    bootstrap: Bootstrap,
) -> HarnessResult:
    """Summarize one task of lm-evaluation-harness from the samples of both models."""
    before, after = (models[name] for name in BEFORE_AFTER)
    comparison = compare_scores(BEFORE_AFTER, before, after, bootstrap, entry)
    assert comparison is not None  # both models have every sample
    return HarnessResult(
        name=entry.name,
        task=entry.task,
        metric=models["baseline"][0].metric,
        samples=len(models["baseline"]),
        truncated=truncated,
        models={name: fmean(line.score for line in lines) for name, lines in models.items()},
        comparison=comparison,
    )


def summarize_text_task(
    entry: TextEval,
    models: Mapping[str, Sequence[TextLine]],
    metric: Metric,
    bootstrap: Bootstrap,
    *,
    revision: str | None,
    rows: RowCounts,
    truncated: int,
    trained_prompts: int,
) -> TextTaskResult:
    """Summarize one task with free answers; see `TextTaskResult` for the arguments by name."""
    lines = models["baseline"]
    after = models["finetuned"]
    comparison = compare_scores(BEFORE_AFTER, lines, after, bootstrap, entry)
    assert comparison is not None  # local models answer everything
    expected = [line.expected for line in lines]
    shuffled = random.Random(bootstrap.seed).sample(expected, len(expected))
    trivial = {
        "majority_answer": ([Counter(expected).most_common(1)[0][0]] * len(lines), True),
        "echoed_prompt": ([line.prompt for line in lines], False),
        "shuffled_answer": (shuffled, True),
    }

    def trivial_score(answers: Sequence[str], are_responses: bool) -> Estimate:
        rows = [Answer(n.prompt, n.expected, a) for n, a in zip(lines, answers, strict=True)]
        graded = metric.grade(rows, are_responses=are_responses)
        return _mean([each.score for each in graded], bootstrap)

    scores = {
        name: _score(entry, each, bootstrap) for name, each in models.items() if answered(each)
    }
    return TextTaskResult(
        name=entry.name,
        task=entry.dataset,
        metric=entry.metric,
        samples=len(lines),
        truncated=truncated,
        models={name: score.score.mean for name, score in scores.items()},
        comparison=comparison,
        revision=revision,
        rows=rows,
        normalization=metric.normalization,
        scores=scores,
        trivial={name: trivial_score(*each) for name, each in trivial.items()},
        trained_prompts=trained_prompts,
        reference_comparison=compare_scores(
            ("finetuned", "reference"), after, models.get("reference", ()), bootstrap, entry
        ),
    )


def _score(entry: TextEval, given: Sequence[TextLine], bootstrap: Bootstrap) -> TextScore:
    lines = list(answered(given).values())
    return TextScore(
        score=_mean([line.score for line in lines], bootstrap),
        unparsed=sum(line.parsed is None for line in lines) if entry.metric in READING else 0,
        **cut_and_missing(given),
        macro_f1=_macro_f1(lines, bootstrap) if entry.metric == "label" else None,
        fields=_right_fields(lines) if entry.metric == "json" else {},
    )


def _mean(scores: Sequence[float], bootstrap: Bootstrap) -> Estimate:
    """Return the mean of scores, with the score interval of a share where all are 0 or 1."""
    if set(scores) <= {0.0, 1.0}:
        share = proportion(round(sum(scores)), len(scores))
        return Estimate(mean=share.share, ci95=share.ci95)
    return bootstrap_mean(scores, bootstrap)


def _macro_f1(lines: Sequence[TextLine], bootstrap: Bootstrap) -> Estimate:
    """Return the mean F1 of the labels that occur in the expected responses or the answers."""
    labels = sorted({label for line in lines for label in (line.target, line.parsed) if label})
    right = np.array([[line.target == line.parsed == label for label in labels] for line in lines])
    named = np.array(
        [[(line.target == label) + (line.parsed == label) for label in labels] for line in lines]
    )

    def mean_f1(means: np.ndarray) -> np.ndarray:
        hits, all_named = means[..., : len(labels)], means[..., len(labels) :]
        occurs = all_named > 0
        f1 = np.divide(2 * hits, all_named, out=np.zeros_like(hits), where=occurs)
        mean: np.ndarray = f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
        return mean

    return bootstrap_mean(np.concatenate([right, named], axis=1), bootstrap, mean_f1)


def _right_fields(lines: Sequence[TextLine]) -> dict[str, Share]:
    """Return how often each field of the expected JSON is right."""
    right: dict[str, list[bool]] = {}
    for line in lines:
        given = {} if line.parsed is None else json_fields(line.parsed)
        for path, value in json_fields(line.target or "null").items():
            right.setdefault(path, []).append(path in given and given[path] == value)
    return {path: proportion(sum(each), len(each)) for path, each in right.items()}
