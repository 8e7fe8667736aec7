"""Multiple-choice questions: rows of any dataset, read as an entry of the spec says.

Options are in several columns or in one, in any of the forms that datasets have. The right option
is an index, a number, a letter, a label or a text; which of them is decided over the complete
column, never value by value. A row that cannot be read is dropped and counted with its reason.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from job.data.examples import RowDroppedError, field_text, fill
from job.data.row_blocks import Row
from job.errors import UsageError
from job.spec.fields import LETTERS, LM_EVAL
from job.spec.schema import MultipleChoiceEval


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; the first option is A."""

    id: str
    text: str
    options: tuple[str, ...]
    gold: str
    """Letter of the right option."""
    group: str | None = None
    """Group to report accuracy by, such as the subject."""

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return LETTERS[: len(self.options)]


@dataclass(frozen=True)
class _Unanswered:
    """A question with the value of its answer, which is not read yet."""

    text: str
    options: tuple[str, ...]
    labels: tuple[str, ...]
    """The options' own labels in the dataset; empty if they have none."""
    answer: str

    @property
    def is_number(self) -> bool:
        """Whether the answer is a number."""
        return self.answer.isascii() and self.answer.isdecimal()

    def readings(self) -> dict[str, int]:
        """Return the position of the right option for each form that the answer can have."""
        count, number = len(self.options), int(self.answer) if self.is_number else -1
        letter = self.answer.upper()
        positions = {
            "label": _position(self.answer, self.labels),
            "index": number if number < count else -1,
            "number": number - 1 if 0 < number <= count else -1,
            "letter": LETTERS.find(letter, 0, count) if len(letter) == 1 else -1,
            "text": _position(self.answer, [_plain(option) for option in self.options]),
        }
        return {form: at for form, at in positions.items() if at >= 0}


AnswerForms = Mapping[bool, str]
"""The form of the answers that are numbers (True), and of the others."""


def answer_forms(entry: MultipleChoiceEval, rows: Iterable[Row]) -> AnswerForms:
    """Return the form of a column of answers; `answer_is: auto` needs all rows to decide it.

    The form is the one that reads every value that can be read at all. So a 0 proves indices, and
    the number of options proves numbers from 1.

    Raises:
        UsageError: no form reads them all, or several do and mean different options.
    """
    if entry.answer_is != "auto":
        return dict.fromkeys((True, False), entry.answer_is)
    examples: dict[bool, dict[tuple[tuple[str, int], ...], _Unanswered]] = {True: {}, False: {}}
    for row in rows:
        try:
            question = _unanswered(entry, row)
        except RowDroppedError:
            continue
        if readings := tuple(question.readings().items()):
            examples[question.is_number].setdefault(readings, question)
    kinds = {is_number: list(known.values()) for is_number, known in examples.items() if known}
    return {is_number: _common_form(entry, questions) for is_number, questions in kinds.items()}


def _common_form(entry: MultipleChoiceEval, questions: Sequence[_Unanswered]) -> str:
    readings = [question.readings() for question in questions]
    uses = Counter(form for each in readings for form in each)
    common = [form for form, count in uses.items() if count == len(readings)]
    if "label" in common:
        return "label"
    if common and all(len({each[form] for form in common}) == 1 for each in readings):
        return common[0]

    def differ(each: Mapping[str, int], a: str, b: str) -> bool:
        return a in each and b in each and each[a] != each[b]

    pairs = list(combinations(common or [form for form, _ in uses.most_common()], 2))
    a, b = next((p for p in pairs if any(differ(each, *p) for each in readings)), pairs[0])
    shown = sorted(questions, key=lambda question: not differ(question.readings(), a, b))

    def meaning(form: str) -> str:
        question = next(question for question in shown if form in question.readings())
        at = question.readings()[form]
        return (
            f"as {form}, {question.answer!r} means {LETTERS[at]} ({question.options[at][:40]!r}) "
            f"for {question.text[:80]!r}"
        )

    raise UsageError(
        f"evals.multiple_choice '{entry.name}': the answers in '{entry.answer}' can be read in two "
        f"ways: {meaning(a)}, but {meaning(b)}; set answer_is to the right one"
    )


class RowReader[T]:
    """Reads items from rows, and counts the rows and those that are dropped, by reason."""

    def __init__(self, read: Callable[[Row, int], T]) -> None:
        """Prepare to read items; `read` gets a row and its number, from 0."""
        self._read = read
        self.rows = 0
        self.dropped: Counter[str] = Counter()

    def items(self, rows: Iterable[Row]) -> Iterator[T]:
        """Yield the usable items in order."""
        for number, row in enumerate(rows):
            self.rows += 1
            try:
                item = self._read(row, number)
            except RowDroppedError as reason:
                self.dropped[str(reason)] += 1
                continue
            yield item

    @property
    def reasons(self) -> str:
        """The most frequent reasons why rows were dropped, for a message."""
        return ", ".join(f"{why} ({n})" for why, n in self.dropped.most_common(3)) or "no rows"


def question_reader(entry: MultipleChoiceEval, forms: AnswerForms) -> RowReader[Question]:
    """Return a reader of questions, one per id."""
    seen: set[str] = set()

    def read(row: Row, number: int) -> Question:
        unanswered = _unanswered(entry, row)
        right = unanswered.readings().get(forms.get(unanswered.is_number, ""))
        if right is None:
            raise RowDroppedError(f"no right option in '{entry.answer}'")
        identity = field_text(row, entry.id) if entry.id else str(number)
        if identity in seen:
            raise RowDroppedError("repeated id")
        seen.add(identity)
        group = None if entry.group is None else _group(row.get(entry.group))
        text, options = unanswered.text, unanswered.options
        order = list(range(len(options)))
        if entry.shuffle_options:  # in an order that only the question's own text decides
            random.Random("\n".join((text, *options))).shuffle(order)
        options = tuple(options[at] for at in order)
        return Question(identity, text, options, LETTERS[order.index(right)], group)

    return RowReader(read)


def _unanswered(entry: MultipleChoiceEval, row: Row) -> _Unanswered:
    text = fill(entry.question, row)
    labels, options = _options(entry, row)
    if entry.prompt != LM_EVAL:  # lm-evaluation-harness does not strip
        text, options = text.strip(), tuple(option.strip() for option in options)
    if not text.strip():
        raise RowDroppedError("empty question")
    if not all(option.strip() for option in options):
        raise RowDroppedError("empty option")
    answer = row.get(entry.answer)
    if isinstance(answer, float) and answer.is_integer():  # a column of integers with gaps
        answer = int(answer)
    is_plain = isinstance(answer, str | int) and not isinstance(answer, bool)
    return _Unanswered(text, options, labels, _plain(answer) if is_plain else "")


def _plain(value: object) -> str:
    """Return a label, option or answer to compare, with full-width characters as ASCII."""
    return unicodedata.normalize("NFKC", str(value)).strip()


def _position(text: str, values: tuple[str, ...] | list[str]) -> int:
    """Return where a text is, or -1 if it is not there exactly once."""
    return values.index(text) if values.count(text) == 1 else -1


def _group(value: object) -> str:
    return "none" if value is None else str(value).strip() or "none"


_LABEL_KEYS = ("label", "labels", "key", "letter", "id")
_TEXT_KEYS = ("text", "texts", "value", "content", "option")


def _options(entry: MultipleChoiceEval, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels, which may be none, and the texts of a row's options."""
    column = entry.options
    if not isinstance(column, str):
        return (), tuple(field_text(row, name) for name in column)
    pairs = _labeled_options(row.get(column))
    if not 2 <= len(pairs) <= len(LETTERS):
        raise RowDroppedError(f"no list of options in '{column}'")
    labels = [_plain(label) for label, _ in pairs]
    if any(label is not None for label, _ in pairs) and len(set(labels)) < len(labels):
        raise RowDroppedError(f"repeated label in '{column}'")
    if all(len(label) == 1 for label in labels):  # so that A is shown as A
        pairs.sort(key=lambda pair: _plain(pair[0]))
        labels.sort()
    texts = tuple(field_text({column: text}, column) for _, text in pairs)
    return (() if pairs[0][0] is None else tuple(labels)), texts


def _labeled_options(value: Any) -> list[tuple[Any, Any]]:
    """Return options as pairs of label and text; the label is None where there is none.

    They are a list of texts, `[{key, value}]`, `{text: [...], label: [...]}` or `{A: ..., B: ...}`;
    anything else has none.
    """
    if isinstance(value, list | tuple):
        if not any(isinstance(item, dict) for item in value):
            return [(None, item) for item in value]
        items = [item if isinstance(item, dict) else {} for item in value]
        return [(_first(item, _LABEL_KEYS), _first(item, _TEXT_KEYS)) for item in items]
    if not isinstance(value, dict):
        return []
    texts, labels = _first(value, _TEXT_KEYS), _first(value, _LABEL_KEYS)
    if isinstance(texts, list):
        labels = [None] * len(texts) if labels is None else labels
        is_paired = isinstance(labels, list) and len(labels) == len(texts)
        return list(zip(labels, texts, strict=True)) if is_paired else []
    if all(len(key) == 1 and key.isalnum() for key in value):
        return [(key, text) for key, text in value.items() if text is not None]
    return []


def _first(value: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((value[key] for key in keys if key in value), None)
