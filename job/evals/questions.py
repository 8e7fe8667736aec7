"""Multiple-choice questions from any dataset: a question, its options, the right one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from job import logs
from job.data.examples import Dropped, field_text, fill
from job.data.sources import Row, open_rows
from job.errors import UsageError
from job.spec import LETTERS, MultipleChoice


@dataclass(frozen=True)
class Question:
    """One question; the first option is A."""

    id: str
    text: str
    options: tuple[str, ...]
    gold: str

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return LETTERS[: len(self.options)]


@dataclass(frozen=True)
class Slice:
    """The questions of one entry of the spec, and where they are from."""

    entry: MultipleChoice
    revision: str | None
    questions: list[Question]


def load_slice(entry: MultipleChoice) -> Slice:
    """The first `limit` usable questions of the entry's dataset.

    Raises:
        UsageError: none is usable.
    """
    rows = open_rows(entry, "questions")
    questions: list[Question] = []
    dropped: Counter[str] = Counter()
    columns: list[str] = []
    seen: set[str] = set()
    reader: Iterator[Row] = iter(rows)
    for number, row in enumerate(reader):
        if entry.limit is not None and len(questions) == entry.limit:
            break
        columns = columns or sorted(row)
        try:
            question = _question(entry, row, number)
            if question.id in seen:
                raise Dropped("repeated id")
            seen.add(question.id)
            questions.append(question)
        except Dropped as reason:
            dropped[str(reason)] += 1
    if not questions:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in dropped.most_common(3)) or "no rows"
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': no usable question in {entry.dataset}: "
            f"{reasons}; the columns are {', '.join(columns)}"
        )
    if entry.limit is not None and len(questions) < entry.limit:
        logs.get().warning(
            "fewer questions than the limit",
            eval=entry.name,
            questions=len(questions),
            limit=entry.limit,
        )
    if dropped:
        logs.get().warning("questions left out", eval=entry.name, reasons=dict(dropped))
    if len({len(question.options) for question in questions}) > 1:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': the questions have different numbers of options"
        )
    return Slice(entry, rows.revision, questions)


def _question(entry: MultipleChoice, row: Row, number: int) -> Question:
    text = fill(entry.question, row)
    if not text:
        raise Dropped("empty question")
    options = _options(entry, row)
    gold = _gold(row, entry.answer, options)
    identity = field_text(row, entry.id) if entry.id else str(number)
    return Question(identity, text, options, gold)


def _options(entry: MultipleChoice, row: Row) -> tuple[str, ...]:
    if isinstance(entry.options, str):
        value = row.get(entry.options)
        if not isinstance(value, list | tuple) or not 2 <= len(value) <= len(LETTERS):
            raise Dropped(f"no list of options in '{entry.options}'")
        if any(option is None for option in value):
            raise Dropped("empty option")
        options = tuple(str(option).strip() for option in value)
    else:
        options = tuple(field_text(row, column).strip() for column in entry.options)
    if not all(options):
        raise Dropped("empty option")
    return options


def _gold(row: Row, column: str, options: tuple[str, ...]) -> str:
    """The letter of the right option: given as 0-based index, as letter, or as text."""
    value: Any = row.get(column)
    letters = LETTERS[: len(options)]
    if isinstance(value, str):
        stripped = value.strip()
        if stripped.upper() in letters and len(stripped) == 1:
            return stripped.upper()
        if options.count(stripped) == 1:
            return letters[options.index(stripped)]
        if stripped.isascii() and stripped.isdecimal():
            value = int(stripped)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return letters[value]
    raise Dropped(f"no right option in '{column}'")


def user_turn(entry: MultipleChoice, question: Question) -> str:
    """The text the user says: the entry's prompt with the question and its lettered options."""
    options = "\n".join(
        f"{letter}. {option}"
        for letter, option in zip(question.letters, question.options, strict=True)
    )
    return entry.prompt.format(question=question.text, options=options)
