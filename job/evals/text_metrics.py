"""The metrics of `evals.tasks`: an answer and the expected text to a score from 0 to 1.

Each metric reads something from a text, such as its last number, and compares what it read in the
answer with what it read in the expected response. An answer that cannot be read scores 0.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import regex

from job.chat.thoughts import split_thoughts
from job.data.words import split_words
from job.errors import UsageError
from job.evals.overlap import overlap_scores
from job.spec.evals import TextEval

READING = ("regex", "number", "json", "label")
"""Metrics that read something in an answer, and may find nothing."""

_EDGES = " \t.,;:!?\"'`*“”‘’„«»。，、！？："
_NUMBER = regex.compile(
    r"(?:(?<!\w)[-+−])?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
_FENCE = regex.compile(r"```(?:json)?\s*(.*?)```", regex.DOTALL | regex.IGNORECASE)
_JSON_STARTS = 20
"""Places in a text at which JSON may begin."""

PATTERN_SECONDS = 5.0
_FUNCTION_SECONDS = 600.0
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")
"""Variables that a metric of the user's sees; secrets are in others."""


class Graded(NamedTuple):
    """A score, and the text that was read in the answer; None if there was nothing to read."""

    score: float
    parsed: str | None


class Answer(NamedTuple):
    """A model's answer, with what was asked and expected."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Metric:
    """A metric of the job's own, or a function of the user's."""

    normalization: str
    """What is read and what is ignored, for the report."""
    read: Callable[[str], str | None]
    """Return what a text says in normal form; None if it says nothing."""
    compare: Callable[[str, str], float]
    """Compare what the expected response and the answer say."""
    read_expected: Callable[[str], str | None] | None = None
    """Return what an expected response says, where that is not read as an answer is."""
    score_all: Callable[[Sequence[Answer]], list[float]] | None = None
    """Score answers by the user's function, which reads nothing."""

    def expected(self, text: str) -> str | None:
        """Return what an expected response says; None if the metric cannot use it."""
        return (self.read_expected or self.read)(split_thoughts(text)[1] or text)

    def grade(self, answers: Sequence[Answer], *, are_responses: bool = False) -> list[Graded]:
        """Score answers, or with `are_responses` the expected responses of other prompts.

        Raises:
            UsageError: a pattern takes too long, or the user's function fails or returns no number
                from 0 to 1.
        """
        if self.score_all is not None:
            scores = self.score_all(answers)
            return [Graded(s, a.answer) for s, a in zip(scores, answers, strict=True)]
        graded = []
        for answer in answers:
            expected = self.expected(answer.expected)
            parsed = (self.expected if are_responses else self.read)(answer.answer)
            is_read = expected is not None and parsed is not None
            score = self.compare(expected or "", parsed or "") if is_read else 0.0
            graded.append(Graded(round(score, 6), parsed))
        return graded


def make_metric(entry: TextEval, labels: Sequence[str] = ()) -> Metric:
    """Return the metric of a task; `labels` are the classes of `metric: label`."""
    if entry.function is not None:
        return Metric(
            "a function of the user's", str, _same, score_all=partial(_run_function, entry)
        )
    if entry.metric == "regex":
        return _regex_metric(entry)
    if entry.metric == "label":
        return _label_metric(labels)
    return _METRICS[entry.metric]


def normalize(text: str) -> str:
    """Return a text in lower case, with single spaces, without punctuation at both ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


def _read_text(text: str) -> str | None:
    return normalize(text) or None


def _same(expected: str, answer: str) -> float:
    return float(expected == answer)


def _f1(expected: str, answer: str) -> float:
    words, given = Counter(split_words(expected)), Counter(split_words(answer))
    if not words or not given:
        return _same(expected, answer)
    return float(2 * (words & given).total() / (words.total() + given.total()))


def _read_number(text: str) -> str | None:
    numbers = [n.replace(",", "").replace("−", "-") for n in _NUMBER.findall(text)]
    return next((number for number in reversed(numbers) if math.isfinite(float(number))), None)


def _same_number(expected: str, answer: str) -> float:
    return float(math.isclose(float(expected), float(answer), rel_tol=1e-6, abs_tol=1e-12))


def _read_json(text: str) -> str | None:
    """Return the first JSON value, in a code block or not, without the text around it."""
    fenced = _FENCE.search(text)
    text = (fenced[1] if fenced else text).strip()
    starts = [match.start() for match in regex.finditer(r"[\[{]", text)]
    for start in [0, *starts][:_JSON_STARTS]:
        with contextlib.suppress(ValueError, RecursionError):
            value, _ = json.JSONDecoder().raw_decode(text, start)
            read = json.dumps(value, ensure_ascii=False)
            json_fields(read)  # not nested too deeply
            return read
    return None


def json_fields(text: str) -> dict[str, Any]:
    """Return the values in JSON text by path, such as `items[0].name`; texts in normal form."""
    fields: dict[str, Any] = {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                collect(f"{path}.{key}" if path else str(key), item)
        elif isinstance(value, list) and value:
            for number, item in enumerate(value):
                collect(f"{path}[{number}]", item)
        elif isinstance(value, str):
            fields[path] = normalize(value)
        else:
            fields[path] = (isinstance(value, bool), value)  # True is not 1

    collect("", json.loads(text))
    return fields


def _same_fields(expected: str, answer: str) -> float:
    wanted, given = json_fields(expected), json_fields(answer)
    same: int = sum(path in given and given[path] == value for path, value in wanted.items())
    return float(same / len(wanted.keys() | given.keys()))


def _label_metric(labels: Sequence[str]) -> Metric:
    """Return the metric of classes: the one label that an answer is, or names as words."""
    by_form: dict[str, str] = {}
    for label in labels:
        form = normalize(label)
        other = by_form.setdefault(form, label)
        if not form or other.casefold() != label.casefold():
            raise UsageError(
                f"evals.tasks: the label {label!r} cannot be told from "
                f"{repr(other) if form else 'an empty answer'}, because punctuation at the ends is "
                "ignored; write labels as words"
            )
    longest = sorted(by_form, key=len, reverse=True)
    named = regex.compile("|".join(rf"(?<!\w){regex.escape(form)}(?!\w)" for form in longest))

    def read(text: str) -> str | None:
        form = normalize(text)
        forms = {form} if form in by_form else set(named.findall(form))
        return by_form[forms.pop()] if len(forms) == 1 else None

    return Metric(
        f"the label that the answer is, or the only one it names, of {', '.join(labels[:12])}"
        f"{' ...' if len(labels) > 12 else ''}; case and punctuation at its ends are ignored",
        read,
        _same,
    )


def _regex_metric(entry: TextEval) -> Metric:
    pattern = regex.compile(entry.pattern or "")

    def read(text: str) -> str | None:
        try:
            matches = list(pattern.finditer(text, timeout=PATTERN_SECONDS))
        except TimeoutError:
            raise UsageError(
                f"evals.tasks '{entry.name}': `pattern` takes more than {PATTERN_SECONDS:g} s "
                "on one text; write one without nested repetitions"
            ) from None
        if not matches:
            return None
        return normalize(matches[-1][1] or "") if pattern.groups else ""

    if not pattern.groups:
        return Metric(f"right if {entry.pattern} occurs", read, _same, lambda _: "")
    return Metric(
        f"the first group of the last match of {entry.pattern}; case and punctuation at its ends "
        "are ignored",
        read,
        _same,
        lambda text: read(text) or normalize(text),
    )


_TEXT = "lower case; spaces and punctuation at the ends are ignored"
_METRICS = {
    "exact_match": Metric(f"the complete answer in {_TEXT}", _read_text, _same),
    "f1": Metric(f"the words in {_TEXT}", _read_text, _f1),
    "number": Metric(
        "the last number, with a point before decimals; equal to six digits",
        _read_number,
        _same_number,
    ),
    "json": Metric(
        "the first JSON value, in a code block or not; share of the fields of both that are "
        f"equal, texts in {_TEXT}",
        _read_json,
        _same_fields,
    ),
    "rouge": Metric("ROUGE-L of words", str, lambda a, b: overlap_scores(a, b)["rougeL"]),
    "chrf": Metric("chrF of characters", str, lambda a, b: overlap_scores(a, b)["chrf"]),
}


_RUNNER = """
import importlib.util, inspect, json, os, sys

path, folder, name = sys.argv[1:]
answers, results = open(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function prints or reads is its own
os.dup2(2, 1)
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("metric", path)
module = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(module)
    function = getattr(module, name)
    try:
        inspect.signature(function).bind(prompt="", expected="", answer="")
    except TypeError:
        raise TypeError(f"define it as {name}(prompt, expected, answer)") from None
    for line in answers:
        print(float(function(**json.loads(line))), file=results)
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"), file=results)
"""


def _run_function(entry: TextEval, answers: Sequence[Answer]) -> list[float]:
    """Score answers by `function(prompt, expected, answer)` of the user's, in its own process."""
    assert entry.function is not None
    path, name = Path(entry.function[0]).resolve(), entry.function[1]
    lines = "".join(json.dumps(answer._asdict()) + "\n" for answer in answers)
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    command = [sys.executable, "-I", "-c", _RUNNER, str(path), str(path.parent), name]
    where = f"evals.tasks '{entry.name}': {entry.metric}"
    with tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                command, input=lines, capture_output=True, encoding="utf-8", errors="replace",
                env=environment | {"HOME": home}, timeout=_FUNCTION_SECONDS, check=False,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UsageError(f"{where} took more than {_FUNCTION_SECONDS:.0f} s") from None
    printed = done.stdout.splitlines()
    if printed and printed[-1].startswith('"'):
        raise UsageError(f"{where} failed: {json.loads(printed[-1])[:300]}")
    if len(printed) != len(answers):
        raise UsageError(f"{where} ended after {len(printed)} of {len(answers)} answers")
    scores = list(map(float, printed))
    for answer, score in zip(answers, scores, strict=True):
        if not 0 <= score <= 1:
            raise UsageError(
                f"{where} returned {score:g} for the answer {answer.answer[:80]!r}; return a "
                "number from 0 to 1"
            )
    return scores
