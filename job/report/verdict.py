"""The verdict: a plain answer to whether fine-tuning helped, and what to do next.

The statistics behind it are in the tests of the results: a finding there is a finding here.
"""

from collections.abc import Iterator
from typing import NamedTuple

from job.evals.metrics import BEFORE_AFTER
from job.evals.statistics import questions_for_retention
from job.report.caveats import trivial_baselines
from job.results import Verdict, VerdictAnswer
from job.scores import (
    Comparison,
    Dialogue,
    Evaluation,
    Finding,
    HarnessResult,
    JudgeResult,
    MultipleChoiceResult,
    PairedTest,
    TextTaskResult,
)

LIKENESS = "likeness to your answers"
"""What ROUGE-L of the answers to held-out prompts measures."""


class Measure(NamedTuple):
    """One thing that fine-tuning was to improve, before and after."""

    noun: str
    before: str
    after: str
    test: PairedTest
    detectable: str
    """The smallest change that would probably have been found."""
    items: str
    note: str = ""
    """What to know about the level."""

    def clause(self) -> str:
        """Say what became of it."""
        change = f"from {self.before} to {self.after}{self.note}"
        match self.test.finding:
            case "improved":
                return f"{self.noun} rose {change}"
            case "worse":
                return f"{self.noun} fell {change}"
            case "no measurable change":
                return (
                    f"no clear change of {self.noun} ({change}; a change of {self.detectable} "
                    "would probably have shown)"
                )
        return f"{self.items} are too few to judge {self.noun} ({change})"


def decide(evaluation: Evaluation) -> Verdict:
    """Return the verdict of a run, from all tasks and held-out dialogues; a judge only comments.

    That the loss on held-out responses fell is said apart: it shows that the model learned the
    data, not that its answers are better. It decides where nothing else was measured.
    """
    measured = [*_tasks(evaluation), *map(task_measure, (*evaluation.harness, *evaluation.tasks))]
    tasks = [measure for measure in measured if measure.test.family == "primary"]
    kept = [measure for measure in measured if measure.test.family == "retention"]
    likeness = [] if evaluation.dialogue is None else [_likeness(evaluation.dialogue)]
    measures = [*likeness, *tasks]
    loss = evaluation.loss.comparison.finding if evaluation.loss else None
    answer = _answer([measure.test.finding for measure in measures] or ([loss] if loss else []))
    if any(measure.test.finding == "worse" for measure in kept):
        answer = "better and worse" if answer in ("better", "better and worse") else "worse"
    clauses = [
        measure.clause()
        for finding in _ORDER
        for measure in measures
        if measure.test.finding == finding
    ]
    if evaluation.loss is not None:
        before, after = (evaluation.loss.models[name].mean for name in BEFORE_AFTER)
        clauses.append(
            f"{_LEARNED[evaluation.loss.comparison.finding]} ({before:.3f} to {after:.3f})"
        )
    if evaluation.judge is not None and evaluation.judge.examples:
        clauses.append(judge_clause(evaluation.judge))
    clauses += _retention(kept)
    tests = [test for task in evaluation.multiple_choice if (test := before_after(task))]
    largest = max(tests, key=lambda test: test.questions, default=None)
    return Verdict(
        answer=answer,
        sentence=f"{_HEADLINES[answer]}: {'; '.join(clauses) or 'nothing was measured'}.",
        next_step=_next_step(answer, measures, loss),
        benchmark=None if largest is None else largest.finding,
        style=likeness[0].test.finding if likeness else None,
        loss=loss,
    )


_ORDER: tuple[Finding, ...] = ("improved", "worse", "no measurable change", "not enough evidence")

_HEADLINES: dict[VerdictAnswer, str] = {
    "better": "Fine-tuning helped",
    "worse": "Fine-tuning hurt",
    "better and worse": "Fine-tuning helped in one way and hurt in another",
    "no clear change": "Fine-tuning made no clear change",
    "not enough evidence": "Fine-tuning cannot be judged on so little evidence",
}

_LEARNED: dict[Finding, str] = {
    "improved": "it learned the data: the loss on held-out responses fell",
    "worse": "the loss on held-out responses rose",
    "no measurable change": "the loss on held-out responses did not change measurably",
    "not enough evidence": "the loss on held-out responses is of too few examples to judge",
}


def _answer(findings: list[Finding]) -> VerdictAnswer:
    if "improved" in findings:
        return "better and worse" if "worse" in findings else "better"
    if "worse" in findings:
        return "worse"
    return "no clear change" if "no measurable change" in findings else "not enough evidence"


def _next_step(answer: VerdictAnswer, measures: list[Measure], loss: Finding | None) -> str:
    if answer == "better":
        return "Read the answers side by side; if you agree, use the adapter."
    if answer in ("worse", "better and worse"):
        return (
            "Do not use the adapter as it is: lower the learning rate or the epochs, or mix in "
            "examples of what got worse."
        )
    few = [measure.items for measure in measures if measure.test.finding == "not enough evidence"]
    if answer == "not enough evidence":
        measured = f"{' and '.join(few)} were measured" if few else "nothing was measured"
        return f"Measure more: {measured}; 50 are the least, 200 or more are better."
    if loss == "no measurable change":
        return "Train longer, or with a higher learning rate or more data: little was learned."
    return (
        "Read the answers side by side. More questions and held-out examples would show smaller "
        "changes."
    )


def before_after(result: MultipleChoiceResult) -> Comparison | None:
    """Return the comparison of the baseline with the fine-tuned model, if both answered."""
    return next((c for c in result.comparisons if (c.a, c.b) == BEFORE_AFTER), None)


def _below(
    before: float, after: float, trivial: float, form: str, of: str = "answers that need no model"
) -> str:
    return f", below the {form.format(trivial)} of {of}" if max(before, after) < trivial else ""


def _tasks(evaluation: Evaluation) -> Iterator[Measure]:
    for task in evaluation.multiple_choice:
        if (test := before_after(task)) is not None:
            before, after = (task.models[name].accuracy for name in BEFORE_AFTER)
            always = f"always answering {task.majority_letter}"
            yield Measure(
                f"{task.name} accuracy", f"{before:.1%}", f"{after:.1%}", test,
                f"{100 * (test.detectable or 0):.1f} points", f"{test.questions:,} questions",
                _below(before, after, task.majority_accuracy, "{:.1%}", always),
            )  # fmt: skip


METRIC_NAMES = {
    "exact_match": "exact match", "f1": "F1", "regex": "accuracy", "number": "accuracy",
    "label": "accuracy", "json": "fields right", "rouge": "ROUGE-L", "chrf": "chrF",
}  # fmt: skip
"""The metrics of tasks with free answers, in words."""


def task_measure(result: HarnessResult | TextTaskResult) -> Measure:
    """Return what a task of lm-evaluation-harness, or one with free answers, measured."""
    before, after = (result.models[name] for name in BEFORE_AFTER)
    test, note = result.comparison, ""
    is_accuracy = isinstance(test, Comparison)
    form = "{:.1%}" if is_accuracy else "{:.3f}"
    if isinstance(result, TextTaskResult):
        trivial = max(estimate.mean for estimate in result.trivial.values())
        note = _below(before, after, trivial, form)
    smallest = test.detectable or 0
    return Measure(
        f"{result.name} {METRIC_NAMES.get(result.metric, result.metric.rpartition(':')[2])}",
        form.format(before), form.format(after), test,
        f"{100 * smallest:.1f} points" if is_accuracy else f"{smallest:.3f}",
        f"{result.samples:,} samples", note,
    )  # fmt: skip


def judge_clause(judge: JudgeResult) -> str:
    """Say which answers the judge preferred, or why that cannot be told."""
    test, rate = judge.comparison, judge.win_rate
    if test is None or rate is None:
        return "no answers were judged"
    shares = f"{rate.mean:.0%} of {test.questions:,} pairs, ties as half"
    if judge.doubt:
        return f"a judge cannot tell the answers apart: {judge.doubt}"
    match test.finding:
        case "improved":
            return f"a judge preferred the tuned answers ({shares})"
        case "worse":
            return f"a judge preferred the answers from before ({shares} for the tuned ones)"
    return f"a judge had no clear preference ({shares} for the tuned answers)"


def _retention(kept: list[Measure]) -> list[str]:
    """Say where the model got worse, where it did not, and where that cannot be told."""
    clauses = [measure.clause() for measure in kept if measure.test.finding == "worse"]
    same = [measure for measure in kept if measure.test.finding == "not worse"]
    if same:
        margins = sorted({100 * (measure.test.margin or 0) for measure in same})
        names = ", ".join(f"{measure.noun}{measure.note}" for measure in same)
        where = "worse nowhere by more than" if len(same) == len(kept) else "not worse by more than"
        limits = " or ".join(f"{m:g}" for m in margins)
        points = "point" if margins == [1] else "points"
        clauses.append(f"{where} {limits} {points} ({names})")
    clauses += [
        f"{measure.items} are too few to tell whether {measure.noun} got worse "
        f"(from {measure.before} to {measure.after}){_needed(measure.test)}"
        for measure in kept
        if measure.test.finding == "cannot tell"
    ]
    return clauses


def _needed(test: PairedTest) -> str:
    if not isinstance(test, Comparison) or not test.margin or not test.gained + test.lost:
        return ""
    needed = questions_for_retention((test.gained + test.lost) / test.questions, test.margin)
    return f"; about {needed:,} would do" if needed > test.questions else ""


def _likeness(dialogue: Dialogue) -> Measure:
    before, after = (dialogue.models[name].rougeL.mean for name in BEFORE_AFTER)
    test = dialogue.comparison
    trivial = max(estimate.mean for _, estimate in trivial_baselines(dialogue.nulls))
    return Measure(
        LIKENESS, f"{before:.3f}", f"{after:.3f}", test, f"{test.detectable or 0:.3f}",
        f"{test.examples:,} held-out dialogues",
        _below(before, after, trivial, "{:.3f}"),
    )  # fmt: skip
