"""A comparison of runs as text on a terminal and as an HTML page."""

from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from job.report.compare import PairTest, RunComparison, ScoreTest
from job.report.render import template_environment
from job.runtime.logs import legible
from job.scores import Comparison, MeanComparison

_MOST_SETTINGS = 24
"""Most settings shown on a terminal; JSON and page have all."""


class Row(NamedTuple):
    """A paired test as text."""

    models: str
    evaluation: str
    matched: str
    difference: str
    p_value: str
    p_holm: str
    finding: str


def rows_of(comparison: RunComparison) -> list[Row]:
    """Return the tests as text, those of accuracy first."""
    return [
        *(_choice_row(c, c.test, f"{c.eval} ({c.scoring})") for c in comparison.multiple_choice),
        *(_score_row(result) for result in comparison.tasks),
        *(
            _mean_row(d, d.test, "ROUGE-L, held-out dialogues", "dialogue")
            for d in comparison.dialogue
        ),
    ]


def _score_row(result: ScoreTest) -> Row:
    name = f"{result.eval} ({result.metric})"
    if isinstance(result.test, Comparison):
        return _choice_row(result, result.test, name)
    return _mean_row(result, result.test, name, "sample")


def _choice_row(result: PairTest, test: Comparison, name: str) -> Row:
    low, high = (f"{100 * end:+.1f}" for end in test.ci95)
    counts = f"{test.gained} gained, {test.lost} lost"
    return Row(
        f"{test.b} vs. {test.a}",
        name,
        _matched(test.questions, "question", result.only_a, result.only_b),
        f"{100 * test.difference:+.1f} points ({low} to {high}; {counts})",
        _p(test.p_value),
        _p(test.p_holm),
        _FINDINGS[test.finding],
    )


def _mean_row(result: PairTest, test: MeanComparison, name: str, item: str) -> Row:
    low, high = (f"{end:+.3f}" for end in test.ci95)
    return Row(
        f"{test.b} vs. {test.a}",
        name,
        _matched(test.examples, item, result.only_a, result.only_b),
        f"{test.difference:+.3f} ({low} to {high})",
        _p(test.p_value),
        _p(test.p_holm),
        _FINDINGS[test.finding],
    )


_FINDINGS = {
    "improved": "higher",
    "worse": "lower",
    "no measurable change": "no measurable difference",
    "not enough evidence": "not enough evidence",
}


def _matched(count: int, what: str, only_a: int, only_b: int) -> str:
    others = f"; {only_a:,} and {only_b:,} do not match" if only_a or only_b else ""
    return f"{count:,} {what}{'' if count == 1 else 's'}{others}"


def _p(value: float) -> str:
    return f"{value:.2g}"


def show(comparison: RunComparison, console: Console) -> None:
    """Print the comparison as tables."""
    labels = [run.label for run in comparison.runs]
    figures = _table("", *labels)
    for figure in comparison.figures:
        figures.add_row(*_cells(figure.name, *(value or "-" for value in figure.values)))
    parts = [figures]
    if comparison.settings:
        settings = _table("Settings that differ", *labels)
        for path, values in list(comparison.settings.items())[:_MOST_SETTINGS]:
            settings.add_row(*_cells(path, *(_setting(value) for value in values)))
        if len(comparison.settings) > _MOST_SETTINGS:
            settings.add_row(*_cells(f"and {len(comparison.settings) - _MOST_SETTINGS} more"))
        parts.append(settings)
    tests = _table("Fine-tuned models", "Evaluation", "Matched", "Difference, 95%", "p", "Holm", "")
    for row in rows_of(comparison):
        tests.add_row(*_cells(*row))
    parts.append(tests)
    console.print(Group(*parts))
    for note in comparison.notes:
        console.print(Text(f"Not compared: {legible(note)}"))
    console.print(
        "Exact McNemar test and sign-flip test on questions and dialogues matched by id and "
        "text. Findings are based on p-values corrected for all tests here (Holm)."
    )


def _setting(value: object) -> str:
    return "-" if value is None else str(value)


def _table(*headings: str) -> Table:
    table = Table(header_style="bold")
    for heading in headings:
        table.add_column(Text(legible(heading)), overflow="fold")
    return table


def _cells(*texts: str) -> list[Text]:
    # As Text, so that brackets are not parsed as markup.
    return [Text(legible(text)) for text in texts]


def render_page(comparison: RunComparison) -> str:
    """Render the comparison as an HTML page."""
    template = template_environment(html=True).get_template("compare.html.j2")
    return template.render(compared=comparison, tests=rows_of(comparison))
