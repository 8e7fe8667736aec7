"""The report of a run, as one HTML file and as Markdown.

This module escapes text, formats numbers and derives key figures and caveats; the templates hold
the layout and the wording. Text from data, models and errors is untrusted: `finalize` of each
template environment escapes every string, so no template can forget to.
"""

import json
import math
import re
import textwrap
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from job.evals.metrics import BEFORE_AFTER
from job.evals.predictions import ChoiceLine
from job.evals.tasks import format_options
from job.report.caveats import caveats, left_out, trivial_baselines, warnings
from job.report.plots import accuracy_bars, loss_curve, model_label, ordered, percent
from job.report.verdict import before_after, judge_clause, task_measure
from job.results import Results
from job.runtime.logs import legible
from job.scores import Comparison, Interval, MeanComparison, MultipleChoiceResult

SHOWN_FLIPS = 20
"""Most changed questions on the page, gained and lost each; all are in predictions.jsonl."""

PHONE_WIDTH = 340
"""Width in pixels of the figures for narrow screens."""


class Flip(NamedTuple):
    """A question that only one of baseline and finetuned answered correctly."""

    eval: str
    before: ChoiceLine
    after: ChoiceLine

    @property
    def question(self) -> str:
        """The question with its options."""
        return f"{self.before.question}\n{format_options(self.before.options)}"


class KeyFigure(NamedTuple):
    """A number under the verdict, with a note in smaller print."""

    label: str
    value: str
    note: str


def render_html(results: Results, history: list[dict[str, Any]], flips: list[Flip]) -> str:
    """Render the report as one HTML file without scripts or network access.

    `history` has the lines of history.jsonl, and `flips` the questions that changed, in order.
    """
    choices = results.evaluation.multiple_choice
    loss = [loss_curve(history), loss_curve(history, width=PHONE_WIDTH)]
    bars = [accuracy_bars(choices), accuracy_bars(choices, width=PHONE_WIDTH)]
    return _render("report.html.j2", results, flips, {"loss": loss, "bars": bars})


def render_markdown(results: Results, history: list[dict[str, Any]], flips: list[Flip]) -> str:
    """Render the report as GitHub-flavored Markdown, without figures; see `render_html`."""
    return _render("report.md.j2", results, flips, {})


def template_environment(*, html: bool) -> Environment:
    """Return the environment of HTML or Markdown templates, which escapes every string."""
    environment = Environment(
        loader=PackageLoader("job.report"),
        autoescape=html,
        finalize=_html_text if html else _markdown_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= _FILTERS
    return environment


def _render(
    template: str, results: Results, flips: list[Flip], drawings: dict[str, list[str]]
) -> str:
    environment = template_environment(html=template.endswith(".html.j2"))
    spec = results.run.model_dump(mode="json")["spec"]
    return environment.get_template(template).render(
        results=results,
        drawings={name: [Markup(svg) for svg in pair] for name, pair in drawings.items()},
        key_figures=key_figures(results),
        warnings=list(warnings(results)),
        caveats=list(caveats(results)),
        flips=_shown_flips(flips),
        spec=spec,
        spec_yaml=yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=88),
    )


def _shown_flips(flips: list[Flip]) -> list[tuple[str, list[Flip], int]]:
    """Return gained and lost flips: kind, the flips to show, and their total number."""
    gained = [flip for flip in flips if flip.after.correct]
    lost = [flip for flip in flips if flip.before.correct]
    groups = [("gained", gained), ("lost", lost)]
    return [(kind, all_[:SHOWN_FLIPS], len(all_)) for kind, all_ in groups if all_]


def key_figures(results: Results) -> list[KeyFigure]:
    """Return the numbers under the verdict: accuracies, ROUGE-L, loss, speed, time."""
    figures = []
    for choice in results.evaluation.multiple_choice[:3]:
        shares = {name: percent(score.accuracy) for name, score in choice.models.items()}
        note = f"{choice.questions:,} questions"
        if pair := before_after(choice):
            difference = f"{_signed(100 * pair.difference, 1)} points"
            note = f"{difference} ({_span(pair.ci95, 100, 1)}), p\u00a0{_p(pair.p_value)}"
        figures.append(KeyFigure(f"Accuracy, {choice.name}", _arrow(shares), note))
    for task in results.evaluation.tasks[:3]:
        measure = task_measure(task)
        note = f"{_signed(task.comparison.difference)} ({_span(task.comparison.ci95)})"
        change = f"{measure.before} \u2192 {measure.after}"
        figures.append(KeyFigure(measure.noun, change, note))
    if dialogue := results.evaluation.dialogue:
        rouge = {name: f"{score.rougeL.mean:.3f}" for name, score in dialogue.models.items()}
        note = f"{_signed(dialogue.comparison.difference)} ({_span(dialogue.comparison.ci95)})"
        figures.append(KeyFigure("Likeness (ROUGE-L), held out", _arrow(rouge), note))
    loss = results.training.loss
    validation = {"baseline": loss.validation_before, "finetuned": loss.validation_after}
    known = {name: _nats(value) for name, value in validation.items() if value is not None}
    label = "Validation loss" if known else "Training loss"
    figures.append(KeyFigure(label, _arrow(known or {"": _nats(loss.train)}), "nats per token"))
    speed = f"{results.training.tokens_per_second:,.0f} tokens/s"
    figures.append(KeyFigure("Training speed", speed, _mfu(results.training.mfu)))
    time, chips = _duration(results.run.seconds), _amount(results.cost.chip_hours, "chip-hours")
    figures.append(KeyFigure("Total time", time, chips))
    return figures


def _arrow(values: dict[str, str]) -> str:
    local = [values[name] for name in BEFORE_AFTER if name in values]
    return " \u2192 ".join(local or values.values()) or "not measured"


def detectable(choice: MultipleChoiceResult) -> str | None:
    """Describe the minimum detectable effect with this many questions."""
    pair = before_after(choice)
    if pair is None:
        return None
    share = percent((pair.gained + pair.lost) / pair.questions)
    basis = f"{pair.questions:,} questions, {share} of them answered correctly by only one model"
    if pair.detectable is None:
        return f"No change is detectable with {basis}."
    return (
        f"The minimum detectable change at 80% power is {100 * pair.detectable:.1f} points, with "
        f"{basis}."
    )


def _html_text(value: object) -> object:
    return legible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown_text(value: object) -> object:
    """Return a string as one line of plain Markdown, in or outside of a table."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = re.sub(r"([\\`*_\[\]<>|~&$#@])", r"\\\1", " ".join(legible(value).split()))
    # Otherwise bare URLs become links.
    return re.sub(r"(?i)(https?|ftp|www)(?=://|\.)", r"\1\\", line)


def _fence(text: str) -> Markup:
    """Return text as a fenced Markdown block, wrapped at 100 columns."""
    wrap = textwrap.TextWrapper(100, break_on_hyphens=False)
    lines = [wrap.wrap(line) or [""] for line in legible(text).split("\n")]
    wrapped = "\n".join(part for line in lines for part in line)
    # The text itself cannot end the block.
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{marks}text\n{wrapped}\n{marks}")


def _literal(value: object) -> Markup:
    """Return a value as a literal of Python, on one line."""
    return Markup(legible(json.dumps(value)))


def _signed(value: float, decimals: int = 3) -> str:
    # Adding zero makes 0.0 of -0.0.
    return f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "\u2212")


def _span(interval: Interval, scale: float = 1, decimals: int = 3) -> str:
    # Joined by a word, because ends may be negative.
    return " to ".join(_signed(scale * end, decimals).removeprefix("+") for end in interval)


def _p(value: float) -> str:
    if value < 1e-12:
        return "< 1e-12"
    return f"{value:#.2g}" if value >= 1e-4 else f"{value:.1e}".replace("e-0", "e-")


def _nats(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"


def _perplexity(loss: float | None) -> str:
    """Return the perplexity of a loss in nats, its exponential."""
    return "not measured" if loss is None else f"{math.exp(min(loss, 700)):,.4g}"


def _mfu(share: float | None) -> str:
    return "MFU not available" if share is None else f"MFU {percent(share)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.1f} s"
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _amount(value: float, unit: str) -> str:
    """Format an amount with two decimals, or a small one with two significant digits."""
    return f"{value:,.2f} {unit}" if value >= 0.1 or value == 0 else f"{value:.2g} {unit}"


def _finding(pair: Comparison | MeanComparison) -> str:
    """Return the finding, in neutral words unless it compares before and after training."""
    if pair.p_not_worse is not None and pair.margin is not None:
        return f"{pair.finding} (margin {pair.margin:.3g}, one-sided p {_p(pair.p_not_worse)})"
    if (pair.a, pair.b) == BEFORE_AFTER:
        return pair.finding
    return {"improved": "higher", "worse": "lower"}.get(pair.finding, pair.finding)


def _frequency(pair: Comparison) -> str:
    """Return the finding about a style trait, which is neither good nor bad."""
    return {"improved": "more often", "worse": "less often"}.get(pair.finding, pair.finding)


_FILTERS = {
    "percent": percent, "signed": _signed, "span": _span, "p": _p, "nats": _nats, "mfu": _mfu,
    "duration": _duration, "amount": _amount, "fence": _fence, "literal": _literal,
    "trivial_baselines": trivial_baselines, "detectable": detectable, "left_out": left_out,
    "perplexity": _perplexity, "frequency": _frequency,
    "judge_clause": judge_clause, "finding": _finding, "label": model_label, "ordered": ordered,
    "number": "{:,.0f}".format, "rouge": "{:.3f}".format,
}  # fmt: skip
