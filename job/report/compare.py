"""The comparison of finished runs: what `job compare` prints as JSON, tables or a page."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from job.errors import UsageError
from job.evals.metrics import compare_choices, compare_dialogues
from job.evals.paired import decide_findings
from job.evals.predictions import ChoiceLine, DialogueLine, HarnessLine, Line, TextLine
from job.evals.statistics import Bootstrap
from job.evals.task_scores import compare_scores
from job.results import Results
from job.scores import (
    Comparison,
    Estimate,
    HarnessResult,
    MeanComparison,
    MultipleChoiceResult,
    Record,
    TextTaskResult,
)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results and the predictions of its fine-tuned model."""

    uri: str
    results: Results
    choices: dict[str, list[ChoiceLine]] = field(default_factory=dict)
    """Predictions by the name of the task."""
    dialogues: list[DialogueLine] = field(default_factory=list)
    scored: dict[str, list[HarnessLine | TextLine]] = field(default_factory=dict)
    """Predictions of tasks with free answers or of lm-evaluation-harness, by name."""


class Figure(Record):
    """A row of the table of figures: one value per run, null if it has none."""

    name: str
    values: list[str | None]


class RunSummary(Record):
    """One of the runs."""

    label: str
    uri: str
    id: str
    finished: str
    verdict: str


class PairTest(Record):
    """A test of two runs, with the number of examples that they do not share."""

    only_a: int
    """Examples of the first run only, or with another text in the second."""
    only_b: int


class TaskTest(PairTest):
    """The fine-tuned models of two runs on the questions that both answered."""

    eval: str
    scoring: Literal["letters", "generate"]
    test: Comparison


class DialogueTest(PairTest):
    """The fine-tuned models of two runs on held-out dialogues that both answered, by ROUGE-L."""

    test: MeanComparison


class ScoreTest(PairTest):
    """The fine-tuned models of two runs on a task with free answers or of the harness."""

    eval: str
    metric: str
    test: Comparison | MeanComparison


class RunComparison(Record):
    """Runs side by side, each tested against the first."""

    schema_version: Literal[1] = 1
    runs: list[RunSummary]
    figures: list[Figure]
    multiple_choice: list[TaskTest]
    tasks: list[ScoreTest]
    dialogue: list[DialogueTest]
    settings: dict[str, list[Any]]
    """Values of the specs that differ, by path: one per run, null if it is not set."""
    notes: list[str]
    """Evaluations that were not compared, with the reason."""


_MODELS = ("baseline", "finetuned", "reference")
_IGNORED = ("name", "output")
"""Settings that do not affect results."""


def compare_runs(runs: Sequence[FinishedRun]) -> RunComparison:
    """Compare two or more runs.

    Raises:
        UsageError: a run shares no question and no dialogue with the first.
    """
    labels = labels_of(runs)
    first, *others = zip(labels, runs, strict=True)
    tasks: list[TaskTest] = []
    scored: list[ScoreTest] = []
    dialogues: list[DialogueTest] = []
    notes: list[str] = []
    for other in others:
        pair = _Pair(first, other)
        task_tests, dialogue_tests = list(pair.tasks()), list(pair.dialogues())
        score_tests = list(pair.scored())
        if not task_tests and not dialogue_tests and not score_tests:
            why = f" ({'; '.join(pair.notes)})" if pair.notes else ""
            raise UsageError(
                f"{other[1].uri} shares no question and no dialogue with {first[1].uri}, so "
                f"there is nothing to compare them on{why}"
            )
        tasks += task_tests
        scored += score_tests
        dialogues += dialogue_tests
        notes += pair.notes
    return decide_findings(
        RunComparison(
            runs=[
                RunSummary(
                    label=label,
                    uri=run.uri,
                    id=run.results.run.id,
                    finished=run.results.run.finished,
                    verdict=run.results.verdict.sentence,
                )
                for label, run in zip(labels, runs, strict=True)
            ],
            figures=[
                figure
                for figure in _figures([run.results for run in runs])
                if any(value is not None for value in figure.values)
            ],
            multiple_choice=tasks,
            tasks=scored,
            dialogue=dialogues,
            settings=differing([run.results.run.spec for run in runs]),
            notes=notes,
        )
    )


def labels_of(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a label for each run: its id if it is unique, otherwise its URI."""
    counts = Counter(run.results.run.id for run in runs)
    return [r.results.run.id if counts[r.results.run.id] == 1 else r.uri for r in runs]


class _Pair:
    """The first run and another."""

    def __init__(self, a: tuple[str, FinishedRun], b: tuple[str, FinishedRun]) -> None:
        (self._a, self._first), (self._b, self._second) = a, b
        spec = self._first.results.run.spec
        samples = int((spec.get("evals") or {}).get("bootstrap_samples", 2000))
        self._models = (self._a, self._b)
        self._bootstrap = Bootstrap(samples, seed=int(spec.get("seed", 0)))
        self.notes: list[str] = []

    def tasks(self) -> Iterator[TaskTest]:
        """Yield tests of multiple-choice tasks with the same name and scoring."""
        ours, theirs = (
            run.results.evaluation.multiple_choice for run in (self._first, self._second)
        )
        for task in self._shared_tasks(ours, theirs, lambda task: task.scoring):
            before, after, unmatched = _shared(
                self._first.choices.get(task.name, []),
                self._second.choices.get(task.name, []),
                _choice_key,
            )
            test = compare_choices(self._models, before, after)
            if test is None:
                self._note(f"{task.name} has no question that both answered")
            else:
                yield TaskTest(
                    eval=task.name,
                    scoring=task.scoring,
                    only_a=unmatched[0],
                    only_b=unmatched[1],
                    test=test,
                )

    def scored(self) -> Iterator[ScoreTest]:
        """Yield tests of other tasks with the same name, metric and normalization."""
        ours, theirs = (scored_tasks(run.results) for run in (self._first, self._second))
        for task in self._shared_tasks(ours, theirs, _way_of_scoring):
            lines = [run.scored.get(task.name, []) for run in (self._first, self._second)]
            before, after, (only_a, only_b) = _shared(lines[0], lines[1], _score_key)
            test = compare_scores(self._models, before, after, self._bootstrap, metric=task.metric)
            if test is None:
                self._note(f"{task.name} has no sample that both answered")
            else:
                yield ScoreTest(
                    eval=task.name, metric=task.metric, only_a=only_a, only_b=only_b, test=test
                )

    def _shared_tasks[T: MultipleChoiceResult | HarnessResult](
        self, first: Sequence[T], second: Sequence[T], way: Callable[[T], str]
    ) -> Iterator[T]:
        """Yield the first run's tasks that the second one has too, scored in the same way."""
        theirs = {task.name: task for task in second}
        for task in first:
            other = theirs.get(task.name)
            if other is None:
                self._note(f"{task.name} is not an evaluation of {self._b}")
            elif way(other) != way(task):
                self._note(f"{task.name} was scored by {way(task)} and by {way(other)}")
            else:
                yield task

    def dialogues(self) -> Iterator[DialogueTest]:
        """Yield the test of held-out dialogues, if answers had the same maximum length."""
        ours, theirs = (run.results.evaluation.dialogue for run in (self._first, self._second))
        if ours is None or theirs is None:
            return
        if ours.max_new_tokens != theirs.max_new_tokens:
            self._note(
                f"dialogues had up to {ours.max_new_tokens} and {theirs.max_new_tokens} new "
                "tokens, and ROUGE depends on that"
            )
            return
        before, after, unmatched = _shared(
            self._first.dialogues, self._second.dialogues, _dialogue_key
        )
        test = compare_dialogues(self._models, before, after, self._bootstrap)
        if test is None:
            self._note("no dialogue was held out of both")
        else:
            yield DialogueTest(only_a=unmatched[0], only_b=unmatched[1], test=test)

    def _note(self, text: str) -> None:
        self.notes.append(f"{self._a} and {self._b}: {text}")


def _choice_key(line: ChoiceLine) -> Hashable:
    return line.id, line.question, tuple(line.options), line.gold


def scored_tasks(results: Results) -> list[HarnessResult | TextTaskResult]:
    """Return the tasks of a run that are scored by a metric of their own."""
    return [*results.evaluation.harness, *results.evaluation.tasks]


def _way_of_scoring(task: HarnessResult | TextTaskResult) -> str:
    reads = f" ({task.normalization})" if isinstance(task, TextTaskResult) else ""
    return f"{task.metric}{reads}"


def _score_key(line: HarnessLine | TextLine) -> Hashable:
    if isinstance(line, TextLine):
        return line.id, line.prompt, line.expected
    return line.id, line.metric, line.target


def _dialogue_key(line: DialogueLine) -> Hashable:
    return line.id, line.prompt, line.expected


def _shared[L: Line](
    first: Sequence[L], second: Sequence[L], key: Callable[[L], Hashable]
) -> tuple[list[L], list[L], tuple[int, int]]:
    """Return the matching lines of both, and the number of lines of each that do not match."""
    both = {key(line) for line in first} & {key(line) for line in second}
    before, after = ([line for line in lines if key(line) in both] for lines in (first, second))
    return before, after, (len(first) - len(before), len(second) - len(after))


def differing(specs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all specs, by path."""
    flat = [dict(_leaves(spec)) for spec in specs]
    paths = dict.fromkeys(path for leaves in flat for path in leaves)
    settings = {path: [leaves.get(path) for leaves in flat] for path in paths}
    return {
        path: values
        for path, values in settings.items()
        if path not in _IGNORED and any(value != values[0] for value in values)
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    named = isinstance(value, list) and all(isinstance(i, dict) and "name" in i for i in value)
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif named and value:
        for item in value:
            yield from _leaves(item, f"{path}.{item['name']}")
    else:
        yield path, value


def _figures(results: Sequence[Results]) -> Iterator[Figure]:
    """Yield the rows of the table of figures: model, data and scores of each run."""
    yield Figure(name="Model", values=[r.model.preset for r in results])
    yield Figure(name="LoRA", values=[f"rank {r.model.lora_rank}" for r in results])
    yield Figure(
        name="Trained on", values=[f"{r.data.train:,} of {r.data.dataset}" for r in results]
    )
    names = dict.fromkeys(c.name for r in results for c in r.evaluation.multiple_choice)
    for name in names:
        tasks = [
            next((c for c in r.evaluation.multiple_choice if c.name == name), None) for r in results
        ]
        for model in _MODELS:
            scores = [c.models.get(model) if c else None for c in tasks]
            yield Figure(
                name=f"{name}, {model}",
                values=[f"{s.accuracy:.1%} ({_span(s.ci95, 100)}%)" if s else None for s in scores],
            )
    for name in dict.fromkeys(task.name for r in results for task in scored_tasks(r)):
        found = [next((t for t in scored_tasks(r) if t.name == name), None) for r in results]
        for model in _MODELS:
            means = [task.models.get(model) if task else None for task in found]
            yield Figure(
                name=f"{name}, {model}", values=[None if m is None else f"{m:.3f}" for m in means]
            )
    for model in _MODELS:
        rouge = [_rouge(r, model) for r in results]
        yield Figure(
            name=f"ROUGE-L, {model}",
            values=[f"{e.mean:.3f} ({_span(e.ci95, 1, 3)})" if e else None for e in rouge],
        )
    for name, losses in (
        ("Validation loss, before", [r.training.loss.validation_before for r in results]),
        ("Validation loss, after", [r.training.loss.validation_after for r in results]),
    ):
        yield Figure(name=name, values=[None if x is None else f"{x:.4f}" for x in losses])
    yield Figure(name="Tokens/s", values=[f"{r.training.tokens_per_second:,.0f}" for r in results])
    yield Figure(name="Minutes", values=[f"{r.run.seconds / 60:.1f}" for r in results])
    yield Figure(
        name="USD", values=[None if r.cost.usd is None else f"{r.cost.usd:.4f}" for r in results]
    )


def _rouge(results: Results, model: str) -> Estimate | None:
    dialogue = results.evaluation.dialogue
    score = dialogue.models.get(model) if dialogue else None
    return score.rougeL if score else None


def _span(interval: tuple[float, float], scale: float, decimals: int = 1) -> str:
    low, high = interval
    return f"{scale * low:.{decimals}f} to {scale * high:.{decimals}f}"
