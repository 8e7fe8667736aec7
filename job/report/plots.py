"""Figures of the report: pure functions from numbers to inline SVG, for light and dark pages.

Matplotlib draws with sentinel colors, which are replaced by CSS variables of the page, so that a
figure follows the reader's color scheme. Text stays text, in the page's font. One unit is one CSS
pixel. Nothing is written to disk, and the same numbers give the same bytes.
"""

import hashlib
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from job.scores import MultipleChoiceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Sentinel colors that `_finish` replaces; the fallbacks are for a figure without a page.
INK, MUTED, ACCENT, RULE, PAPER = "#01fe01", "#01fe02", "#01fe03", "#01fe04", "#01fe05"

_CSS = {
    INK: "currentColor",
    MUTED: "var(--muted, #77808b)",
    ACCENT: "var(--accent, #2a6fb8)",
    RULE: "var(--rule, #77808b55)",
    PAPER: "var(--paper, none)",
}

_RC: dict[Any, Any] = {
    "svg.hashsalt": "job.report", "svg.fonttype": "none", "text.parse_math": False,
    "font.size": 12, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE,
    "xtick.color": MUTED, "ytick.color": MUTED, "grid.color": RULE, "grid.linewidth": 1,
    "legend.frameon": False, "legend.borderpad": 0, "legend.borderaxespad": 0,
    "legend.fontsize": 11, "legend.labelcolor": MUTED,
}  # fmt: skip

_MOST_POINTS = 100
"""Most points of a line; of more, neighbors are averaged, which makes it smooth."""

_BAR, _GROUP_TITLE, _GROUP_GAP, _TOP, _BOTTOM = 24, 44, 20, 30, 26
MODEL_ORDER = ("baseline", "finetuned", "reference")


def model_label(name: str) -> str:
    """Return the model's name for readers, which marks the reference as remote."""
    return "reference (remote)" if name == "reference" else name


def ordered[Score](models: Mapping[str, Score]) -> list[tuple[str, Score]]:
    """Return the models' entries in the order of MODEL_ORDER, then others by name."""
    rank = {name: place for place, name in enumerate(MODEL_ORDER)}
    return sorted(models.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0]))


def percent(share: float) -> str:
    """Format a share from 0 to 1 as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def loss_curve(history: Sequence[Mapping[str, Any]], *, width: int = 720) -> str:
    """Draw the training loss per logged step, with validation losses as markers.

    Args:
        history: lines of history.jsonl: `step` with `loss` or `validation_loss`, in nats per
            token. Values that are not finite are skipped; of a step logged twice (a resumed run)
            the later line counts.
        width: width in CSS pixels; below 480 the layout is that for a phone.

    Returns:
        An `<svg>` element, or '' if no loss was logged.
    """
    train, validation = _series(history, "loss"), _series(history, "validation_loss")
    if not len(train) and not len(validation):
        return ""
    from matplotlib import ticker

    with _style():
        height = 330 if width >= 480 else 260
        figure, axes = _canvas(width, height, left=44, right=14, top=30, bottom=44)
        if len(train):
            dot = "o" if len(train) == 1 else None
            axes.plot(*_thinned(train).T, color=ACCENT, linewidth=2, marker=dot, label="training")
        if len(validation):
            axes.plot(
                *validation.T, linestyle="none", color=INK, marker="o", markersize=7,
                markerfacecolor=PAPER, markeredgewidth=1.6, zorder=5, label="validation",
            )  # fmt: skip
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.grid(axis="y")
        axes.margins(x=0.03, y=0.08)
        _text(figure, 0, 14, "Loss, nats per token", weight="bold")
        axes.legend()
        return _finish(figure, "Training and validation loss by step, in nats per token.")


def accuracy_bars(multiple_choice: Sequence[MultipleChoiceResult], *, width: int = 720) -> str:
    """Draw accuracies in percent: one group per eval, one bar per model with its 95% interval.

    Bars are horizontal, so that long names stay readable on a phone. A dotted line is chance, a
    dashed line always answering the majority letter.

    Args:
        multiple_choice: the evals, in order.
        width: width in CSS pixels.

    Returns:
        An `<svg>` element, or '' if there is no score to draw.
    """
    groups = [group for group in multiple_choice if group.models]
    if not groups:
        return ""
    from matplotlib import lines, ticker

    with _style():
        heights = [_GROUP_TITLE + _BAR * len(group.models) + _GROUP_GAP for group in groups]
        height = _TOP + sum(heights) + _BOTTOM
        figure, axes = _canvas(width, height, left=126, right=60, top=_TOP, bottom=_BOTTOM)
        highest = max(
            max(score.ci95[1], score.accuracy, group.chance, group.majority_accuracy)
            for group in groups
            for score in group.models.values()
        )
        axes.set_xlim(0, min(100, 10 * math.ceil(10 * highest + 1e-9)))
        axes.set_ylim(sum(heights), 0)
        axes.yaxis.set_visible(False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:.0f}%")
        top = 0
        for group, size in zip(groups, heights, strict=True):
            _draw_group(figure, axes, group, top)
            top += size
        kinds = {"95% interval": "-", "chance": ":", "majority letter": "--"}
        keys = [lines.Line2D([], [], color=INK, ls=ls, label=kind) for kind, ls in kinds.items()]
        figure.legend(handles=keys, loc="upper left", ncols=3)
        return _finish(figure, "Accuracies with 95% intervals; the table has the numbers.")


def _draw_group(figure: "Figure", axes: "Axes", group: MultipleChoiceResult, top: int) -> None:
    """Draw one eval, `top` pixels below the upper edge of the axes."""
    first = top + _GROUP_TITLE
    last = first + _BAR * len(group.models)
    _text(figure, 0, _TOP + top + 14, _plain(group.name, figure.bbox.width / 9), weight="bold")
    facts = (
        f"{group.questions:,} questions; chance {percent(group.chance)}, "
        f"always {_plain(group.majority_letter, 3)} {percent(group.majority_accuracy)}"
    )
    _text(figure, 0, _TOP + top + 31, facts, fontsize=11, color=MUTED)
    for place, (name, score) in enumerate(ordered(group.models)):
        middle = first + _BAR * (place + 0.5)
        low, high = (100 * end for end in score.ci95)
        fill = {"finetuned": ACCENT, "reference": PAPER}.get(name, MUTED)
        axes.barh(
            middle, 100 * score.accuracy, height=_BAR - 8, color=fill, linewidth=1,
            alpha=1 if name in ("finetuned", "reference") else 0.6,
            edgecolor=MUTED if name == "reference" else "none",
        )  # fmt: skip
        # An outline in the paper's color keeps a bright line visible on a bright bar.
        ends = [middle - 4, middle + 4, middle, middle, middle - 4, middle + 4]
        for color, line in ((PAPER, 4.5), (INK, 1.5)):
            axes.plot([low] * 3 + [high] * 3, ends, color=color, linewidth=line)
        _text(figure, 116, _TOP + middle, _plain(model_label(name), 18), ha="right", va="center")
        axes.annotate(
            percent(score.accuracy), (max(high, 100 * score.accuracy), middle), xytext=(7, 0),
            textcoords="offset points", va="center", weight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.vlines(axes.get_xticks()[1:], first, last, color=RULE, linewidth=1, zorder=0)
    axes.vlines(100 * group.chance, first, last, color=INK, linestyle=":", zorder=4)
    axes.vlines(100 * group.majority_accuracy, first, last, color=INK, linestyle="--", zorder=4)


@contextmanager
def _style() -> Iterator[None]:
    """Use our settings over matplotlib's defaults, regardless of the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def _canvas(
    width: int, height: int, left: int, right: int, top: int, bottom: int
) -> "tuple[Figure, Axes]":
    """Return an empty figure of this size in pixels, with margins around its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    inner = ((width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes((left / width, bottom / height, *inner))
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(length=0, pad=6, labelsize=11)
    axes.set_axisbelow(True)
    return figure, axes


def _text(figure: "Figure", x: float, y: float, text: str, **style: Any) -> None:
    """Write text at a position in pixels from the upper left corner of the figure."""
    width, height = figure.bbox.width, figure.bbox.height
    figure.text(x / width, 1 - y / height, text, **style)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """Return the logged steps and their values, `[points, 2]`."""
    lines = [line for line in history if isinstance(line.get(key), int | float)]
    values = {int(line["step"]): float(line[key]) for line in lines if math.isfinite(line[key])}
    return np.array(sorted(values.items())).reshape(-1, 2)


def _thinned(series: np.ndarray) -> np.ndarray:
    parts = np.array_split(series, min(len(series), _MOST_POINTS))
    return np.array([part.mean(axis=0) for part in parts])


def _plain(text: str, most: float = math.inf) -> str:
    """Return text of at most `most` characters, with those XML forbids replaced."""
    text = text if len(text) <= most else text[: int(most) - 1] + "\u2026"
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _finish(figure: "Figure", words: str) -> str:
    """Return the figure as an SVG element for an HTML page, with `words` as its description."""
    file, dates = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=dates)
    # Matplotlib's style sheet selects `*`, which would apply to the full page.
    svg = re.sub(r"<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    salt = "f" + hashlib.sha256((words + svg).encode()).hexdigest()[:10] + "-"
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    root = ET.fromstring(svg)
    for element in root.iter():
        # HTML needs no namespaces, and without them the page holds no URL at all.
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: text for name, text in element.attrib.items()}
        if (name := attributes.pop("id", None)) in used:
            attributes["id"] = f"{salt}{name}"
        for key, value in attributes.items():
            if key in ("href", "clip-path"):
                value = value.replace("#", f"#{salt}")
            elif key == "style":
                value = re.sub(r" ?font-family: [^;]*;?", "", value)
                value = re.sub("#01fe0[1-5]", lambda match: _CSS[match[0]], value)
            attributes[key] = re.sub(r"\s*\n", " ", value).strip()
        element.attrib, element.tail = attributes, None
        element.text = element.text if element.tag == "text" else None
    # Points to pixels.
    width, height = (root.attrib[side].removesuffix("pt") for side in ("width", "height"))
    root.attrib |= {"width": width, "height": height, "role": "img", "aria-label": words}
    root.attrib["style"] = "stroke-linejoin: round; stroke-linecap: butt"
    title = ET.Element("title")
    title.text = words
    root.insert(0, title)
    return ET.tostring(root, encoding="unicode")
