"""Multiple-choice questions from any dataset: a question, its options, the right one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from job.chat.conversation import Conversation, Message
from job.data.examples import RowDroppedError, field_text, fill
from job.data.sources import Row, open_source
from job.errors import UsageError
from job.runtime import logs
from job.spec.fields import LETTERS, LM_EVAL
from job.spec.pinning import NONE, Revisions
from job.spec.schema import MultipleChoiceEval


@dataclass(frozen=True)
class Question:
    """One question; the first option is A."""

    id: str
    text: str
    options: tuple[str, ...]
    gold: str
    group: str | None = None
    """What accuracy is reported by, such as the subject."""

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return LETTERS[: len(self.options)]


@dataclass(frozen=True)
class Task:
    """The questions of one entry of the spec, and where they are from."""

    entry: MultipleChoiceEval
    revision: str | None
    questions: list[Question]
    shots: list[Question] = field(default_factory=list)
    """Solved questions that stand before each."""


def shots_source(entry: MultipleChoiceEval) -> MultipleChoiceEval | None:
    """Where the solved questions of an entry are from; None where it wants none."""
    if entry.few_shot is None:
        return None
    given = entry.few_shot.model_dump(include={"split", "data_files"}, exclude_none=True)
    return entry.model_copy(update=given)


def load_task(entry: MultipleChoiceEval, revisions: Revisions = NONE) -> Task:
    """The first `limit` usable questions of the entry's dataset.

    Raises:
        UsageError: none is usable.
    """
    rows = open_source(entry, "questions", revisions)
    reading = _Reading(entry)
    questions = list(islice(reading.questions(rows), entry.limit))
    dropped = reading.dropped
    if not questions:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in dropped.most_common(3)) or "no rows"
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': no usable question in {entry.dataset}: "
            f"{reasons}; the columns are {', '.join(reading.columns)}"
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
    return Task(entry, rows.revision, questions, _shots(entry, questions, revisions))


def _shots(
    entry: MultipleChoiceEval, questions: Sequence[Question], revisions: Revisions
) -> list[Question]:
    """The solved questions of an entry, none of which is asked."""
    source = shots_source(entry)
    if source is None or entry.few_shot is None:
        return []
    asked = {(question.text, question.options) for question in questions}
    rows = open_source(source, "questions", revisions)
    others = (q for q in _Reading(source).questions(rows) if (q.text, q.options) not in asked)
    shots = list(islice(others, entry.few_shot.examples))
    if len(shots) < entry.few_shot.examples:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': few_shot.examples is "
            f"{entry.few_shot.examples}, but only {len(shots)} usable questions of split "
            f"'{source.split}' are not asked themselves; name another split, or set limit"
        )
    return shots


class _Reading:
    """One pass over rows for questions, and what became of those that are none."""

    def __init__(self, entry: MultipleChoiceEval) -> None:
        self._entry = entry
        self.dropped: Counter[str] = Counter()
        self.columns: list[str] = []

    def questions(self, rows: Iterable[Row]) -> Iterator[Question]:
        """The usable questions in order; an id is used once."""
        seen: set[str] = set()
        for number, row in enumerate(rows):
            self.columns = self.columns or sorted(row)
            try:
                question = _question(self._entry, row, number)
                if question.id in seen:
                    raise RowDroppedError("repeated id")
            except RowDroppedError as reason:
                self.dropped[str(reason)] += 1
                continue
            seen.add(question.id)
            yield question


def _question(entry: MultipleChoiceEval, row: Row, number: int) -> Question:
    text = fill(entry.question, row)
    options = _options(entry, row)
    if entry.prompt != LM_EVAL:  # which takes texts as they are
        text, options = text.strip(), tuple(option.strip() for option in options)
    if not text.strip():
        raise RowDroppedError("empty question")
    if not all(option.strip() for option in options):
        raise RowDroppedError("empty option")
    gold = _gold(row, entry, options)
    identity = field_text(row, entry.id) if entry.id else str(number)
    group = None if entry.group is None else _group(row.get(entry.group))
    return Question(identity, text, options, gold, group)


def _group(value: object) -> str:
    return "none" if value is None else str(value).strip() or "none"


def _options(entry: MultipleChoiceEval, row: Row) -> tuple[str, ...]:
    if not isinstance(entry.options, str):
        return tuple(field_text(row, column) for column in entry.options)
    value = row.get(entry.options)
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= len(LETTERS):
        raise RowDroppedError(f"no list of options in '{entry.options}'")
    if any(option is None for option in value):
        raise RowDroppedError("empty option")
    return tuple(str(option) for option in value)


def _gold(row: Row, entry: MultipleChoiceEval, options: tuple[str, ...]) -> str:
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
            raise RowDroppedError(f"ambiguous '{entry.answer}': set answer_is to index or text")
        chosen = next(iter(meanings), None)
    if chosen is None:
        raise RowDroppedError(f"no right option in '{entry.answer}'")
    return chosen


def _at(letters: str, place: int | None) -> str | None:
    return letters[place] if place is not None and 0 <= place < len(letters) else None


_END = "Answer:"


class BeforeLetter(NamedTuple):
    """What stands before the letter that answers."""

    text: str
    space: str


def lettered(question: Question) -> str:
    """The options of a question, a line each."""
    pairs = zip(question.letters, question.options, strict=True)
    return "\n".join(f"{letter}. {option}" for letter, option in pairs)


def user_turn(entry: MultipleChoiceEval, question: Question) -> str:
    """What the user says: the entry's prompt with the question and its lettered options."""
    if entry.prompt == LM_EVAL:
        return _harness(question)
    return entry.prompt.format(question=question.text, options=lettered(question))


def question_messages(task: Task) -> list[list[Message]]:
    """Return the conversation that asks each question: solved ones first, with their letters."""
    solved: list[Message] = []
    for shot in task.shots:
        solved.append(Message("user", user_turn(task.entry, shot)))
        solved.append(Message("assistant", shot.gold))
    return [
        [*solved, Message("user", user_turn(task.entry, question))] for question in task.questions
    ]


def question_prompts(task: Task) -> Sequence[Conversation | str]:
    """Return what a local model is given to answer each question."""
    if task.entry.prompt == LM_EVAL:
        solved = "".join(f"{_harness(shot)} {shot.gold}\n\n" for shot in task.shots)
        return [solved + _harness(question) for question in task.questions]
    return question_messages(task)


def before_letter(entry: MultipleChoiceEval) -> BeforeLetter:
    """What the letters are scored after."""
    return BeforeLetter(_END, " ") if entry.prompt == LM_EVAL else BeforeLetter("", "")


def _harness(question: Question) -> str:
    """The prompt of lm-evaluation-harness's task `medmcqa`."""
    return f"Question: {question.text}\nChoices:\n{lettered(question)}\n{_END}"
