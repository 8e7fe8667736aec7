"""The comparison of finished runs: what `job compare` prints as JSON, tables or a page."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from job.errors import UsageError
from job.evals.paired import decide_findings
from job.evals.predictions import DIALOGUE, ScoredLine
from job.evals.statistics import Bootstrap
from job.evals.task_scores import compare_scores
from job.report.plots import MODEL_ORDER
from job.results import Results
from job.scores import (
    Comparison,
    Dialogue,
    DialogueScore,
    HarnessResult,
    MeanComparison,
    ModelScore,
    MultipleChoiceResult,
    Record,
    TextTaskResult,
)

type Evaluated = MultipleChoiceResult | HarnessResult | TextTaskResult | Dialogue


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its results and the predictions of its fine-tuned model."""

    label: str
    """The run's id; in a comparison with another run of this id, the URI."""
    uri: str
    results: Results
    lines: dict[str, list[ScoredLine]]
    """Predictions by the name of the evaluation."""


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
    """A test of the fine-tuned models of two runs, on the examples that both answered."""

    only_a: int
    """Examples of the first run only, or with another text in the second."""
    only_b: int
    test: Comparison | MeanComparison


class TaskTest(PairTest):
    """A test of a multiple-choice task."""

    eval: str
    scoring: Literal["letters", "generate"]


class ScoreTest(PairTest):
    """A test of a task with free answers or of lm-evaluation-harness."""

    eval: str
    metric: str


class RunComparison(Record):
    """Runs side by side, each tested against the first."""

    schema_version: Literal[1] = 1
    runs: list[RunSummary]
    figures: list[Figure]
    multiple_choice: list[TaskTest]
    tasks: list[ScoreTest]
    dialogue: list[PairTest]
    """Tests of ROUGE-L on held-out dialogues."""
    settings: dict[str, list[Any]]
    """Values of the specs that differ, by path: one per run, null if it is not set."""
    notes: list[str]
    """Evaluations that were not compared, with the reason."""


_IGNORED = ("name", "output")
"""Settings that do not affect results."""


def compare_runs(runs: Sequence[FinishedRun]) -> RunComparison:
    """Compare two or more runs.

    Raises:
        UsageError: a run shares no question and no dialogue with the first.
    """
    ids = Counter(run.label for run in runs)
    runs = [run if ids[run.label] == 1 else replace(run, label=run.uri) for run in runs]
    first, *others = runs
    tests: list[PairTest] = []
    notes: list[str] = []
    for other in others:
        found, unmatched = _compare_pair(first, other)
        if not found:
            why = f" ({'; '.join(unmatched)})" if unmatched else ""
            raise UsageError(
                f"{other.uri} shares no question and no dialogue with {first.uri}, so "
                f"there is nothing to compare them on{why}"
            )
        tests += found
        notes += unmatched
    return decide_findings(
        RunComparison(
            runs=[
                RunSummary(
                    label=run.label,
                    uri=run.uri,
                    id=run.results.run.id,
                    finished=run.results.run.finished,
                    verdict=run.results.verdict.sentence,
                )
                for run in runs
            ],
            figures=[
                figure
                for figure in _figures([run.results for run in runs])
                if any(value is not None for value in figure.values)
            ],
            multiple_choice=[test for test in tests if isinstance(test, TaskTest)],
            tasks=[test for test in tests if isinstance(test, ScoreTest)],
            dialogue=[test for test in tests if type(test) is PairTest],
            settings=differing([run.results.run.spec for run in runs]),
            notes=notes,
        )
    )


def evaluations(results: Results) -> dict[str, Evaluated]:
    """Return the evaluations that can be compared, by name."""
    evaluation = results.evaluation
    found: dict[str, Evaluated] = {task.name: task for task in evaluation.multiple_choice}
    found |= {task.name: task for task in (*evaluation.harness, *evaluation.tasks)}
    if evaluation.dialogue is not None:
        found[DIALOGUE] = evaluation.dialogue
    return found


def _way_of_scoring(result: Evaluated) -> str:
    match result:
        case MultipleChoiceResult():
            return result.scoring
        case TextTaskResult():
            return f"{result.metric} ({result.normalization})"
        case HarnessResult():
            return result.metric
    return f"ROUGE-L of up to {result.max_new_tokens} new tokens"


def _compare_pair(a: FinishedRun, b: FinishedRun) -> tuple[list[PairTest], list[str]]:
    """Test two runs on what both answered; say which evaluations are not tested."""
    tests, notes = [], []
    others = evaluations(b.results)
    for name, result in evaluations(a.results).items():
        way = _way_of_scoring(result)
        if name not in others:
            notes.append(f"{name} is not an evaluation of {b.label}")
        elif (other_way := _way_of_scoring(others[name])) != way:
            notes.append(f"{name} was scored by {way} and by {other_way}")
        elif test := _test(name, result, a, b):
            tests.append(test)
        else:
            notes.append(f"{name} has nothing that both answered")
    return tests, [f"{a.label} and {b.label}: {note}" for note in notes]


def _test(name: str, result: Evaluated, a: FinishedRun, b: FinishedRun) -> PairTest | None:
    """Test one evaluation of two runs; None if they share no answered example."""
    lines = [run.lines.get(name, []) for run in (a, b)]
    both = set.intersection(*({_asked(line) for line in each} for each in lines))
    before, after = ([line for line in each if _asked(line) in both] for each in lines)
    spec = a.results.run.spec
    samples = int((spec.get("evals") or {}).get("bootstrap_samples", 2000))
    bootstrap = Bootstrap(samples, seed=int(spec.get("seed", 0)))
    metric = result.metric if isinstance(result, HarnessResult) else None
    metric = "rouge" if isinstance(result, Dialogue) else metric
    test = compare_scores((a.label, b.label), before, after, bootstrap, metric=metric)
    if test is None:
        return None
    fields = {
        "only_a": len(lines[0]) - len(before),
        "only_b": len(lines[1]) - len(after),
        "test": test,
    }
    match result:
        case MultipleChoiceResult():
            return TaskTest.model_validate(fields | {"eval": name, "scoring": result.scoring})
        case HarnessResult():
            return ScoreTest.model_validate(fields | {"eval": name, "metric": metric})
    return PairTest.model_validate(fields)


def _asked(line: ScoredLine) -> str:
    """Return what was asked and expected, which the lines of two runs are matched by."""
    names = {"id", "question", "options", "gold", "prompt", "expected", "metric", "target"}
    return line.model_dump_json(include=names)


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

    def figure(name: str, value: Callable[[Results], str | None]) -> Figure:
        return Figure(name=name, values=[value(each) for each in results])

    yield figure("Model", lambda r: r.model.preset)
    yield figure("LoRA", lambda r: f"rank {r.model.lora_rank}")
    yield figure("Trained on", lambda r: f"{r.data.train:,} of {r.data.dataset}")
    found = [evaluations(each) for each in results]
    for name in dict.fromkeys(name for each in found for name in each):
        label = "ROUGE-L" if name == DIALOGUE else name
        for model in MODEL_ORDER:
            values = [_score(each.get(name), model) for each in found]
            yield Figure(name=f"{label}, {model}", values=values)
    yield figure("Validation loss, before", lambda r: _decimals(r.training.loss.validation_before))
    yield figure("Validation loss, after", lambda r: _decimals(r.training.loss.validation_after))
    yield figure("Tokens/s", lambda r: f"{r.training.tokens_per_second:,.0f}")
    yield figure("Minutes", lambda r: f"{r.run.seconds / 60:.1f}")
    yield figure("USD", lambda r: _decimals(r.cost.usd))


def _score(result: Evaluated | None, model: str) -> str | None:
    score = result.models.get(model) if result else None
    match score:
        case ModelScore():
            low, high = (f"{100 * end:.1f}" for end in score.ci95)
            return f"{score.accuracy:.1%} ({low} to {high}%)"
        case DialogueScore():
            low, high = (f"{end:.3f}" for end in score.rougeL.ci95)
            return f"{score.rougeL.mean:.3f} ({low} to {high})"
    return None if score is None else f"{score:.3f}"


def _decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
