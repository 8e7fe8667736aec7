"""`job compare`: finished runs side by side, as tables, JSON or an HTML page."""

import os
from collections.abc import Sequence
from pathlib import Path

from job.commands.fetch import open_finished_run, read_artifact
from job.errors import StageError, UsageError
from job.evals.predictions import (
    ChoiceLine,
    DialogueLine,
    HarnessLine,
    ScoredLine,
    TextLine,
    parse_predictions,
)
from job.pipeline import layout
from job.report.compare import FinishedRun, RunComparison, compare_runs, evaluations
from job.runtime import logs
from job.scores import Dialogue, HarnessResult, MultipleChoiceResult, TextTaskResult

_LINES: dict[type, type[ScoredLine]] = {
    MultipleChoiceResult: ChoiceLine,
    HarnessResult: HarnessLine,
    TextTaskResult: TextLine,
    Dialogue: DialogueLine,
}
"""The predictions of each kind of evaluation."""


def compare_finished(uris: Sequence[str], html: str | None = None) -> RunComparison:
    """Compare finished runs, and write a page to the file `html`.

    Raises:
        UsageError: there are fewer than two runs, one is not finished, or they share no example.
        StageError: files of a run are missing or damaged, or the page cannot be written.
    """
    logs.configure()
    if len(uris) < 2:
        raise UsageError("name at least two runs; a run is <output>/<run-id>")
    runs = [read_finished(uri) for uri in uris]
    places = [run.uri for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{place} is named twice; name different runs")
    comparison = compare_runs(runs)
    if html is not None:
        from job.report.compare_render import render_page

        try:
            Path(html).write_text(render_page(comparison), encoding="utf-8")
        except OSError as error:
            raise StageError(f"cannot write {html}: {error.strerror or error}") from error
    return comparison


def read_finished(uri: str) -> FinishedRun:
    """Load a finished run with the predictions of its fine-tuned model, and check checksums."""
    store, _, results = open_finished_run(uri)
    lines = {}
    for name, result in evaluations(results).items():
        content = read_artifact(store, results, layout.predictions("finetuned", name))
        lines[name] = parse_predictions(content or b"", _LINES[type(result)])
    place = store.uri if uri.startswith("gs://") else os.path.realpath(uri)
    return FinishedRun(results.run.id, place, results, lines)
