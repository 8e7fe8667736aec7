"""Tasks: a set of questions and how to ask and score them, as in lm-evaluation-harness.

A `Task` is loaded from rows of any dataset by one `evals.multiple_choice` entry of the spec. Its
prompts are conversations, or plain text for `prompt: lm-eval`. The prompts shown side by side
are here too.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from job.chat.conversation import Conversation, Message
from job.data.examples import Example, RowDroppedError, field_text, fill, last_prompt
from job.data.row_blocks import Row
from job.data.sources import open_source
from job.errors import UsageError
from job.runtime import logs
from job.spec.evals import SideBySideEval
from job.spec.fields import LETTERS, LM_EVAL
from job.spec.pinning import NONE, Revisions
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
class Task:
    """The questions of one entry of the spec, with the entry that says how to score them."""

    entry: MultipleChoiceEval
    revision: str | None
    """Commit of the dataset, where it has one."""
    questions: list[Question]
    few_shot: list[Question] = field(default_factory=list)
    """Solved examples before each question."""


def few_shot_source(entry: MultipleChoiceEval) -> MultipleChoiceEval | None:
    """Return the source of an entry's few-shot examples; None for zero-shot."""
    if entry.few_shot is None:
        return None
    source = entry.few_shot.model_dump(include={"split", "data_files"}, exclude_none=True)
    return entry.model_copy(update=source)


def load_task(entry: MultipleChoiceEval, revisions: Revisions = NONE) -> Task:
    """Load the first `limit` usable questions of the entry's dataset, and few-shot examples.

    Raises:
        UsageError: no question is usable, they differ in their number of options, or there are
            too few examples.
    """
    rows = open_source(entry, "questions", revisions)
    reader = _QuestionReader(entry)
    questions = list(islice(reader.read(rows), entry.limit))
    if not questions:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in reader.dropped.most_common(3))
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': no usable question in {entry.dataset}: "
            f"{reasons or 'no rows'}; the columns are {', '.join(reader.columns)}"
        )
    if entry.limit is not None and len(questions) < entry.limit:
        logs.get().warning(
            "fewer questions than the limit",
            eval=entry.name,
            questions=len(questions),
            limit=entry.limit,
        )
    if reader.dropped:
        logs.get().warning("questions dropped", eval=entry.name, reasons=dict(reader.dropped))
    if len({len(question.options) for question in questions}) > 1:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': the questions have different numbers of options"
        )
    return Task(entry, rows.revision, questions, _few_shot_examples(entry, questions, revisions))


def _few_shot_examples(
    entry: MultipleChoiceEval, questions: Sequence[Question], revisions: Revisions
) -> list[Question]:
    """Return the first usable questions that are not scored themselves."""
    source = few_shot_source(entry)
    if source is None or entry.few_shot is None:
        return []
    scored = {(question.text, question.options) for question in questions}
    rows = open_source(source, "questions", revisions)
    others = (q for q in _QuestionReader(source).read(rows) if (q.text, q.options) not in scored)
    examples = list(islice(others, entry.few_shot.examples))
    if len(examples) < entry.few_shot.examples:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': few_shot.examples is "
            f"{entry.few_shot.examples}, but split '{source.split}' has only {len(examples)} "
            "usable questions that are not scored themselves; name another split, or set limit"
        )
    return examples


class _QuestionReader:
    """Reads questions from rows and counts the rows it drops, by reason."""

    def __init__(self, entry: MultipleChoiceEval) -> None:
        self._entry = entry
        self.dropped: Counter[str] = Counter()
        self.columns: list[str] = []

    def read(self, rows: Iterable[Row]) -> Iterator[Question]:
        """Yield the usable questions in order, one per id."""
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
    if entry.prompt != LM_EVAL:  # lm-evaluation-harness does not strip
        text, options = text.strip(), tuple(option.strip() for option in options)
    if not text.strip():
        raise RowDroppedError("empty question")
    if not all(option.strip() for option in options):
        raise RowDroppedError("empty option")
    gold = _gold(entry, row, options)
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


def _gold(entry: MultipleChoiceEval, row: Row, options: tuple[str, ...]) -> str:
    """Return the letter of the right option, in the form that `answer_is` names.

    `auto` reads a number as a 0-based index and text as a letter or an option's text; a value
    that could mean two different options is refused.
    """
    value: Any = row.get(entry.answer)
    letters = LETTERS[: len(options)]
    text = value.strip() if isinstance(value, str) else ""
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif text.isascii() and text.isdecimal():
        number = int(text)
    by_form: dict[str, str | None] = {
        "index": _letter_at(letters, number),
        "number": _letter_at(letters, None if number is None else number - 1),
        "letter": text.upper() if len(text) == 1 and text.upper() in letters else None,
        "text": letters[options.index(text)] if options.count(text) == 1 else None,
    }
    if entry.answer_is != "auto":
        gold = by_form[entry.answer_is]
    else:
        candidates = {by_form[form] for form in ("index", "letter", "text")} - {None}
        if len(candidates) > 1:
            raise RowDroppedError(f"ambiguous '{entry.answer}': set answer_is to index or text")
        gold = next(iter(candidates), None)
    if gold is None:
        raise RowDroppedError(f"no right option in '{entry.answer}'")
    return gold


def _letter_at(letters: str, index: int | None) -> str | None:
    return letters[index] if index is not None and 0 <= index < len(letters) else None


# Prompts


_LM_EVAL_END = "Answer:"


def format_options(options: Sequence[str]) -> str:
    """Return options one per line, each after its letter."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def doc_to_text(entry: MultipleChoiceEval, question: Question) -> str:
    """Return the user message that asks a question; for `prompt: lm-eval` the harness's text.

    The latter equals the prompt of lm-evaluation-harness's task `medmcqa`.
    """
    options = format_options(question.options)
    if entry.prompt == LM_EVAL:
        return f"Question: {question.text}\nChoices:\n{options}\n{_LM_EVAL_END}"
    return entry.prompt.format(question=question.text, options=options)


def question_messages(task: Task) -> list[list[Message]]:
    """Return the conversation for each question; few-shot examples are earlier turns."""
    examples: list[Message] = []
    for example in task.few_shot:
        examples.append(Message("user", doc_to_text(task.entry, example)))
        examples.append(Message("assistant", example.gold))
    return [
        [*examples, Message("user", doc_to_text(task.entry, question))]
        for question in task.questions
    ]


def question_prompts(task: Task) -> Sequence[Conversation | str]:
    """Return the prompt of a local model for each question."""
    if task.entry.prompt == LM_EVAL:
        examples = "".join(
            f"{doc_to_text(task.entry, example)} {example.gold}\n\n" for example in task.few_shot
        )
        return [examples + doc_to_text(task.entry, question) for question in task.questions]
    return question_messages(task)


def letter_context(entry: MultipleChoiceEval) -> tuple[str, str]:
    """Return the end of the prompt and the delimiter, which letters are tokenized after."""
    return (_LM_EVAL_END, " ") if entry.prompt == LM_EVAL else ("", "")


@dataclass(frozen=True)
class SideBySidePrompt:
    """A prompt that every model answers, with the expected answer if there is one."""

    id: str
    messages: tuple[Message, ...]
    expected: str | None = None

    @property
    def text(self) -> str:
        """The last message of the user."""
        return last_prompt(self.messages)


def side_by_side_prompts(
    examples: Iterable[Example], section: SideBySideEval
) -> list[SideBySidePrompt]:
    """Return the prompts of held-out examples, then the spec's own.

    Args:
        examples: the first `section.max_examples` held-out examples.
        section: of the spec.
    """
    held_out = [
        SideBySidePrompt(example.id, example.prompt_messages, example.response)
        for example in examples
    ]
    own = [
        SideBySidePrompt(f"prompt-{number}", (Message("user", prompt),))
        for number, prompt in enumerate(section.prompts, 1)
    ]
    return held_out + own
