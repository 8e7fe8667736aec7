"""The comparison of runs as words: for the terminal, and for the page."""

from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from job.report.compare import Compared, DialogueTest, SliceTest
from job.report.page import legible

_SHOWN = 24
"""Settings that differ on the terminal; JSON and page have all."""


class Row(NamedTuple):
    """A paired test in words."""

    what: str
    evaluation: str
    matched: str
    difference: str
    p_value: str
    p_holm: str
    finding: str


def rows_of(compared: Compared) -> list[Row]:
    """The tests in words, those of accuracy first."""
    return [_choice_row(test) for test in compared.multiple_choice] + [
        _dialogue_row(test) for test in compared.dialogue
    ]


def _choice_row(found: SliceTest) -> Row:
    test = found.test
    low, high = (f"{100 * end:+.1f}" for end in test.ci95)
    counts = f"{test.gained} gained, {test.lost} lost"
    return Row(
        f"{test.b} against {test.a}",
        f"{found.eval} ({found.scoring})",
        _matched(test.questions, "question", found.only_a, found.only_b),
        f"{100 * test.difference:+.1f} points ({low} to {high}; {counts})",
        _p(test.p_value),
        _p(test.p_holm),
        _FINDINGS[test.finding],
    )


def _dialogue_row(found: DialogueTest) -> Row:
    test = found.test
    low, high = (f"{end:+.3f}" for end in test.ci95)
    return Row(
        f"{test.b} against {test.a}",
        "ROUGE-L, held-out dialogues",
        _matched(test.examples, "dialogue", found.only_a, found.only_b),
        f"{test.difference:+.3f} ({low} to {high})",
        _p(test.p_value),
        _p(test.p_holm),
        _FINDINGS[test.finding],
    )


_FINDINGS = {
    "improved": "higher",
    "worse": "lower",
    "no measurable change": "no measurable difference",
}


def _matched(count: int, what: str, only_a: int, only_b: int) -> str:
    others = f"; {only_a:,} and {only_b:,} do not match" if only_a or only_b else ""
    return f"{count:,} {what}{'' if count == 1 else 's'}{others}"


def _p(value: float) -> str:
    return f"{value:.2g}"


def show(compared: Compared, console: Console) -> None:
    """Print the comparison as tables."""
    labels = [run.label for run in compared.runs]
    figures = _table("", *labels)
    for figure in compared.figures:
        figures.add_row(*_cells(figure.name, *(value or "-" for value in figure.values)))
    parts = [figures]
    if compared.settings:
        settings = _table("Settings that differ", *labels)
        for path, values in list(compared.settings.items())[:_SHOWN]:
            settings.add_row(*_cells(path, *(_setting(value) for value in values)))
        if len(compared.settings) > _SHOWN:
            settings.add_row(*_cells(f"and {len(compared.settings) - _SHOWN} more"))
        parts.append(settings)
    tests = _table("Tuned models", "Evaluation", "Matched", "Difference, 95%", "p", "Holm", "")
    for row in rows_of(compared):
        tests.add_row(*_cells(*row))
    parts.append(tests)
    console.print(Group(*parts))
    for note in compared.notes:
        console.print(Text(f"Not compared: {legible(note)}"))
    console.print(
        "Exact McNemar and paired bootstrap on what matches by id and text; findings go by the "
        "p-values corrected for all tests here (Holm)."
    )


def _setting(value: object) -> str:
    return "-" if value is None else str(value)


def _table(*headings: str) -> Table:
    table = Table(header_style="bold")
    for heading in headings:
        table.add_column(Text(legible(heading)), overflow="fold")
    return table


def _cells(*texts: str) -> list[Text]:
    # As Text, so that brackets in them are not taken for markup.
    return [Text(legible(text)) for text in texts]


def render_page(compared: Compared) -> str:
    """The page; the same comparison gives the same text."""
    environment = Environment(
        loader=PackageLoader("job.report"),
        autoescape=True,
        finalize=lambda value: legible(value) if isinstance(value, str) else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("compare.html.j2").render(
        compared=compared, tests=rows_of(compared)
    )
