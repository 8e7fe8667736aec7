"""The page a run leaves: its results as one HTML file and as Markdown.

This module makes text harmless, writes figures and derives the key figures and the caveats;
the templates beside it hold the order, the words and the looks. Text the job did not write
(data, model answers, error messages) is hostile: `finalize` of each environment makes every
string legible and harmless, so that no template can forget to.
"""

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from job.report.plots import accuracy_bars, loss_curve, model_label, ordered, percent, rate_curve
from job.results import (
    Comparison,
    DialogueComparison,
    Estimate,
    Interval,
    MultipleChoiceResult,
    Results,
    TrivialBaselines,
)

SHOWN_FLIPS = 40
"""Changed questions on the page, gained and lost together; all are in predictions.jsonl."""


PHONE_WIDTH = 340
"""Pixels of the second drawing of each figure, the one narrow screens show."""


@dataclass(frozen=True)
class Flip:
    """A question that one of baseline and finetuned got right and the other did not.

    `before` and `after` are the answers of baseline and finetuned, None where none could be
    read; `gained` is true where the finetuned model is the one that was right.
    """

    eval: str
    id: str
    question: str
    gold: str
    before: str | None
    after: str | None
    gained: bool


class KeyFigure(NamedTuple):
    """A number of the strip under the verdict; `note` is the smaller print below it."""

    label: str
    value: str
    note: str


def render_html(results: Results, history: list[dict[str, Any]], flips: list[Flip]) -> str:
    """Write the page as one HTML file that needs no network and no script.

    Args:
        results: The finished run.
        history: Lines of history.jsonl, as `plots.loss_curve` takes them; may be empty.
        flips: Questions that went from wrong to right or back, in the order to show them.

    Returns:
        The document; the same arguments give the same text.
    """
    choices = results.evaluation.multiple_choice
    loss = [loss_curve(history), loss_curve(history, width=PHONE_WIDTH)]
    bars = [accuracy_bars(choices), accuracy_bars(choices, width=PHONE_WIDTH)]
    rate = [rate_curve(history), rate_curve(history, width=PHONE_WIDTH)]
    return _render("report.html.j2", results, flips, {"loss": loss, "rate": rate, "bars": bars})


def render_markdown(results: Results, history: list[dict[str, Any]], flips: list[Flip]) -> str:
    """Write the page as GitHub-flavoured Markdown: the same words and tables without figures.

    Args and return value as in `render_html`, whose curve is all that `history` serves.
    """
    return _render("report.md.j2", results, flips, {})


def template_environment(*, html: bool) -> Environment:
    """The environment of the templates, for HTML or Markdown: every string is made harmless."""
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
        caveats=list(caveats(results)),
        flips=_shown_flips(flips),
        spec=spec,
        spec_yaml=yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=88),
    )


def _shown_flips(flips: list[Flip]) -> list[tuple[str, list[Flip], int]]:
    """Gained and lost, each with what is shown of it and how many there are in all."""
    gained, lost = ([flip for flip in flips if flip.gained is wanted] for wanted in (True, False))
    # Each has half of the places, and what the other leaves of its own.
    most_gained = SHOWN_FLIPS - min(len(lost), SHOWN_FLIPS // 2)
    most_lost = SHOWN_FLIPS - min(len(gained), most_gained)
    groups = [("gained", gained, most_gained), ("lost", lost, most_lost)]
    return [(kind, all_[:most], len(all_)) for kind, all_, most in groups if all_]


def key_figures(results: Results) -> list[KeyFigure]:
    """The few numbers of the strip: accuracies, ROUGE-L, loss, speed, time."""
    figures = []
    for choice in results.evaluation.multiple_choice[:3]:
        shares = {name: percent(score.accuracy) for name, score in choice.models.items()}
        note = f"{choice.questions:,} questions"
        for pair in choice.comparisons:
            if (pair.a, pair.b) == _BEFORE_AFTER:
                difference = f"{_signed(100 * pair.difference, 1)} points"
                note = f"{difference} ({_span(pair.ci95, 100, 1)}), p\u00a0{_p(pair.p_value)}"
        figures.append(KeyFigure(f"Accuracy, {choice.name}", _arrow(shares), note))
    if dialogue := results.evaluation.dialogue:
        rouge = {name: f"{score.rougeL.mean:.3f}" for name, score in dialogue.models.items()}
        note = f"{_signed(dialogue.comparison.difference)} ({_span(dialogue.comparison.ci95)})"
        figures.append(KeyFigure("ROUGE-L, held out", _arrow(rouge), note))
    loss = results.training.loss
    validation = {"baseline": loss.validation_before, "finetuned": loss.validation_after}
    known = {name: _nats(value) for name, value in validation.items() if value is not None}
    label = "Validation loss" if known else "Training loss"
    figures.append(KeyFigure(label, _arrow(known or {"": _nats(loss.train)}), "nats a token"))
    speed = f"{results.training.tokens_per_second:,.0f} tokens/s"
    figures.append(KeyFigure("Training speed", speed, _mfu(results.training.mfu)))
    time, chips = _duration(results.run.seconds), _amount(results.cost.chip_hours, "chip-hours")
    figures.append(KeyFigure("Time in all", time, chips))
    return figures


_BEFORE_AFTER = ("baseline", "finetuned")


def _arrow(values: dict[str, str]) -> str:
    local = [values[name] for name in _BEFORE_AFTER if name in values]
    return " \u2192 ".join(local or values.values()) or "not measured"


def null_answers(nulls: TrivialBaselines) -> list[tuple[str, Estimate]]:
    """The answers that know nothing, each with its ROUGE-L."""
    return [
        ("The prompt echoed", nulls.echoed_prompt),
        ("Another prompt's answer", nulls.other_answer),
        ("One polite sentence for all", nulls.polite_sentence),
    ]


def detectable(choice: MultipleChoiceResult) -> str | None:
    """How small a change would be found with this many questions, in words."""
    pair = next((c for c in choice.comparisons if (c.a, c.b) == _BEFORE_AFTER), None)
    if pair is None:
        return None
    asked = f"With {pair.questions:,} questions"
    if pair.detectable is None:
        return f"{asked} that so seldom differ, no change could be found."
    return (
        f"{asked}, of which {percent((pair.gained + pair.lost) / pair.questions)} were answered "
        f"right by only one of the two, a change under {100 * pair.detectable:.1f} points would "
        "be missed more often than one time in five."
    )


def caveats(results: Results) -> Iterator[str]:
    """What a careful reader should hold against these results."""
    choices, dialogue = results.evaluation.multiple_choice, results.evaluation.dialogue
    if results.model.preset == "tiny":
        yield "The model is tiny and random: this run tests the job and says nothing of a real one."
    yield (
        f"This is a single run with one seed ({results.run.spec.get('seed', 'not recorded')}). "
        "Intervals cover the choice of questions, not the spread between training runs."
    )
    for choice in choices:
        yield from _choice_caveats(choice)
    if choices:
        yield (
            "Accuracy depends by points on the prompt and on the scoring mode (letters: their "
            "logits compared; generate: text parsed): compare only what was scored alike."
        )
    if sum(len(choice.comparisons) for choice in choices) + bool(dialogue) > 1:
        yield "There are several comparisons: findings go by p-values corrected for that (Holm)."
    if dialogue:
        yield (
            "ROUGE measures overlap of words with one expected answer, not correctness, and moves "
            f"with the length of the answers (at most {dialogue.max_new_tokens:,} tokens here)."
        )
        null = max(estimate.mean for _, estimate in null_answers(dialogue.nulls))
        for name, rouge in ordered(dialogue.models):
            if rouge.rougeL.ci95[0] <= null:
                yield f"ROUGE-L of {model_label(name)} is not measurably above knowing nothing."
    if cut := results.training.truncated:
        yield f"{cut:,} training examples were longer than the limit and lost their end."
    if results.reference.status != "skipped":
        yield "The reference is remote: its provider may change weights and settings any day."


def _choice_caveats(choice: MultipleChoiceResult) -> Iterator[str]:
    widths = [score.ci95[1] - score.ci95[0] for score in choice.models.values()]
    if widths:
        yield (
            f"{choice.name}: with {choice.questions:,} questions an accuracy is uncertain by about "
            f"\u00b1{50 * max(widths):.1f} points (95%); judge changes by the paired comparison."
        )
    if choice.in_training_text:
        yield (
            f"{choice.name}: {choice.in_training_text:,} questions share a passage with the "
            "training text (evals/contamination.json lists them)."
        )
    for name, score in ordered(choice.models):
        label, answered = model_label(name), sum(score.letters.values())
        if score.ci95[0] <= choice.majority_accuracy:
            yield (
                f"{choice.name}: {label} is not measurably above always answering "
                f"{choice.majority_letter} ({percent(choice.majority_accuracy)})."
            )
        for letter, chosen in score.letters.items():
            if chosen > 0.6 * answered:
                share = percent(chosen / answered)
                yield f"{choice.name}: {label} chose {letter} in {share} of its answers."
        if score.missing:
            missing = f"{score.missing:,} questions got no answer from {label}"
            yield f"{choice.name}: {missing}; its accuracy leaves them out."


def legible(text: str) -> str:
    """Text with every invisible or direction-changing character shown by name.

    Line breaks, tabs and the joiners that scripts and emoji are written with stay.
    """

    def shown(char: str) -> str:
        if char.isprintable() or char in "\n\t\u200c\u200d" or unicodedata.category(char) == "Zs":
            return char
        # Not the control pictures of Unicode: few fonts have them.
        return f"\u2039U+{ord(char):04X}\u203a"

    return text if text.isprintable() else "".join(map(shown, text.replace("\r\n", "\n")))


def _html_text(value: object) -> object:
    return legible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown_text(value: object) -> object:
    """A string as one line of plain Markdown, inside a table or not."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = re.sub(r"([\\`*_\[\]<>|~&$#@])", r"\\\1", " ".join(legible(value).split()))
    # Bare addresses would become links.
    return re.sub(r"(?i)(https?|ftp|www)(?=://|\.)", r"\1\\", line)


def _fence(text: str) -> Markup:
    """Text as a fenced Markdown block that no line of it can end, wrapped at 100 columns."""
    marks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    wrap = textwrap.TextWrapper(100, break_on_hyphens=False)
    lines = [wrap.wrap(line) or [""] for line in legible(text).split("\n")]
    return Markup("\n".join([f"{marks}text", *(part for line in lines for part in line), marks]))


def _signed(value: float, decimals: int = 3) -> str:
    # Adding zero turns -0.0 into 0.0.
    return f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "\u2212")


def _span(interval: Interval, scale: float = 1, decimals: int = 3) -> str:
    # Joined by a word, because an end may be negative.
    return " to ".join(_signed(scale * end, decimals).removeprefix("+") for end in interval)


def _p(value: float) -> str:
    if value < 1e-12:
        return "< 1e-12"
    return f"{value:#.2g}" if value >= 1e-4 else f"{value:.1e}".replace("e-0", "e-")


def _nats(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"


def _perplexity(loss: float | None) -> str:
    """The exponential of a loss in nats: between how many tokens the model is torn, as it were."""
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
    """Two decimals, or two significant digits of a small amount."""
    return f"{value:,.2f} {unit}" if value >= 0.1 or value == 0 else f"{value:.2g} {unit}"


def _finding(pair: Comparison | DialogueComparison) -> str:
    """The finding, in neutral words where `b` is not `a` after training."""
    if (pair.a, pair.b) == _BEFORE_AFTER:
        return pair.finding
    return {"improved": "higher", "worse": "lower"}.get(pair.finding, pair.finding)


def _oftener(pair: Comparison) -> str:
    """The finding about a habit, which is neither good nor bad."""
    return {"improved": "more often", "worse": "less often"}.get(pair.finding, pair.finding)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


_FILTERS = {
    "percent": percent, "signed": _signed, "span": _span, "p": _p, "nats": _nats, "mfu": _mfu,
    "duration": _duration, "amount": _amount, "size": _size, "fence": _fence,
    "null_answers": null_answers, "detectable": detectable, "perplexity": _perplexity,
    "oftener": _oftener,
    "finding": _finding, "label": model_label, "ordered": ordered,
    "number": "{:,.0f}".format, "rouge": "{:.3f}".format,
}  # fmt: skip
