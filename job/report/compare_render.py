"""A comparison of runs as text on a terminal and as an HTML page."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job.report.compare import PairTest, RunComparison
from job.report.render import template_environment
from job.runtime.logs import legible
from job.scores import Comparison

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
        *(_row(each, f"{each.eval} ({each.scoring})") for each in comparison.multiple_choice),
        *(_row(each, f"{each.eval} ({each.metric})") for each in comparison.tasks),
        *(_row(each, "ROUGE-L, held-out dialogues", "dialogue") for each in comparison.dialogue),
    ]


def _row(result: PairTest, name: str, item: str = "sample") -> Row:
    test = result.test
    if isinstance(test, Comparison):
        count, item = test.questions, "question"
        low, high = (f"{100 * end:+.1f}" for end in test.ci95)
        counts = f"{test.gained} gained, {test.lost} lost"
        difference = f"{100 * test.difference:+.1f} points ({low} to {high}; {counts})"
    else:
        count = test.examples
        low, high = (f"{end:+.3f}" for end in test.ci95)
        difference = f"{test.difference:+.3f} ({low} to {high})"
    matched = f"{count:,} {item}{'' if count == 1 else 's'}"
    if result.only_a or result.only_b:
        matched += f"; {result.only_a:,} and {result.only_b:,} do not match"
    p_value, p_holm = f"{test.p_value:.2g}", f"{test.p_holm:.2g}"
    finding = _FINDINGS[test.finding]
    return Row(f"{test.b} vs. {test.a}", name, matched, difference, p_value, p_holm, finding)


_FINDINGS = {
    "improved": "higher",
    "worse": "lower",
    "no measurable change": "no measurable difference",
    "not enough evidence": "not enough evidence",
}


def show(comparison: RunComparison, console: Console) -> None:
    """Print the comparison as tables."""
    labels = [run.label for run in comparison.runs]
    figures = [(f.name, *(value or "-" for value in f.values)) for f in comparison.figures]
    console.print(_table(["", *labels], figures))
    if comparison.settings:
        settings = [
            (path, *("-" if value is None else str(value) for value in values))
            for path, values in comparison.settings.items()
        ]
        shown, more = settings[:_MOST_SETTINGS], len(settings) - _MOST_SETTINGS
        if more > 0:
            shown.append((f"and {more} more",))
        console.print(_table(["Settings that differ", *labels], shown))
    headings = ["Fine-tuned models", "Evaluation", "Matched", "Difference, 95%", "p", "Holm", ""]
    console.print(_table(headings, rows_of(comparison)))
    for note in comparison.notes:
        console.print(Text(f"Not compared: {legible(note)}"))
    console.print(
        "Exact McNemar test and sign-flip test on questions and dialogues matched by id and "
        "text. Findings are based on p-values corrected for all tests here (Holm)."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    # As Text, so that brackets are not parsed as markup.
    table = Table(header_style="bold")
    for heading in headings:
        table.add_column(Text(legible(heading)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(legible(text)) for text in row))
    return table


def render_page(comparison: RunComparison) -> str:
    """Render the comparison as an HTML page."""
    template = template_environment(html=True).get_template("compare.html.j2")
    return template.render(compared=comparison, tests=rows_of(comparison))
