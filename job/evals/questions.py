"""Multiple-choice questions from any dataset: a question, its options, the right one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from job import logs
from job.data.examples import Dropped, field_text, fill
from job.data.sources import Row, open_rows
from job.errors import UsageError
from job.revisions import NONE, Revisions
from job.spec import MultipleChoice
from job.spec_types import LETTERS


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


def load_slice(entry: MultipleChoice, revisions: Revisions = NONE) -> Slice:
    """The first `limit` usable questions of the entry's dataset.

    Raises:
        UsageError: none is usable.
    """
    rows = open_rows(entry, "questions", revisions)
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
    gold = _gold(row, entry, options)
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


def _gold(row: Row, entry: MultipleChoice, options: tuple[str, ...]) -> str:
    """The letter of the right option, given as the entry says.

    `auto` takes a number for a 0-based index and text for a letter or an option's text, and
    refuses what could be both.
    """
    value: Any = row.get(entry.answer)
    letters = LETTERS[: len(options)]
    text = value.strip() if isinstance(value, str) else ""
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif text.isascii() and text.isdecimal():
        number = int(text)
    found: dict[str, str | None] = {
        "index": _at(letters, number),
        "number": _at(letters, None if number is None else number - 1),
        "letter": text.upper() if len(text) == 1 and text.upper() in letters else None,
        "text": letters[options.index(text)] if options.count(text) == 1 else None,
    }
    if entry.answer_is != "auto":
        chosen = found[entry.answer_is]
    else:
        meanings = {found[kind] for kind in ("index", "letter", "text")} - {None}
        if len(meanings) > 1:
            raise Dropped(f"ambiguous '{entry.answer}': set answer_is to index or text")
        chosen = next(iter(meanings), None)
    if chosen is None:
        raise Dropped(f"no right option in '{entry.answer}'")
    return chosen


def _at(letters: str, place: int | None) -> str | None:
    return letters[place] if place is not None and 0 <= place < len(letters) else None


def user_turn(entry: MultipleChoice, question: Question) -> str:
    """The text the user says: the entry's prompt with the question and its lettered options."""
    options = "\n".join(
        f"{letter}. {option}"
        for letter, option in zip(question.letters, question.options, strict=True)
    )
    return entry.prompt.format(question=question.text, options=options)
