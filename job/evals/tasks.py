"""Tasks: a set of questions and how to ask and score them, as in lm-evaluation-harness.

A `Task` is loaded from rows of any dataset by one `evals.multiple_choice` entry of the spec. Its
prompts are conversations, or plain text for `prompt: lm-eval`. A `TextTask` has free answers and
is loaded by an entry of `evals.tasks`. The prompts shown side by side are here too, and what
turns the replies to all of them into lines of predictions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from job.chat.conversation import Conversation, Message
from job.chat.thoughts import split_thoughts
from job.data.examples import Example, ExampleMapper
from job.data.sources import open_source
from job.errors import UsageError
from job.evals.answer_parsing import parse_choice
from job.evals.overlap import overlap_scores
from job.evals.predictions import (
    ChoiceLine,
    DialogueLine,
    Reply,
    SideLine,
    TextLine,
    choice_line,
)
from job.evals.questions import AnswerForms, Question, RowReader, answer_forms, question_reader
from job.evals.text_metrics import READING, Answer, Metric, make_metric
from job.runtime import logs
from job.scores import RowCounts
from job.spec.evals import HELD_OUT, SideBySideEval, TextEval
from job.spec.fields import LETTERS, LM_EVAL
from job.spec.pinning import NONE, Revisions
from job.spec.schema import MultipleChoiceEval


@dataclass(frozen=True)
class Task:
    """The questions of one entry of the spec, with the entry that says how to score them."""

    entry: MultipleChoiceEval
    revision: str | None
    """Commit of the dataset, where it has one."""
    questions: list[Question]
    rows: RowCounts
    """The rows that were read, used and dropped."""
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
        UsageError: no question is usable, the answers can be read in two ways, or there are too
            few examples.
    """
    rows = open_source(entry, "questions", revisions)
    forms = answer_forms(entry, rows)
    reader = question_reader(entry, forms)
    questions = list(islice(reader.items(rows), entry.limit))
    if not questions:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': no usable question in {entry.dataset}: "
            f"{reader.reasons}; the columns are {', '.join(sorted(next(iter(rows), {})))}"
        )
    if entry.limit is not None and len(questions) < entry.limit:
        logs.get().warning(
            "fewer questions than the limit",
            eval=entry.name,
            questions=len(questions),
            limit=entry.limit,
        )
    dropped = dict(reader.dropped.most_common())
    if dropped:
        logs.get().warning("questions dropped", eval=entry.name, rows=reader.rows, reasons=dropped)
    if len(questions) > 1 and len({question.gold for question in questions}) == 1:
        logs.get().warning(
            "the right option always has the same letter",
            eval=entry.name,
            letter=questions[0].gold,
            hint="shuffle_options: true",
        )
    counts = RowCounts(raw=reader.rows, valid=len(questions), dropped=dropped)
    few_shot = _few_shot_examples(entry, forms, questions, revisions)
    return Task(entry, rows.revision, questions, counts, few_shot)


def _few_shot_examples(
    entry: MultipleChoiceEval,
    forms: AnswerForms,
    questions: Sequence[Question],
    revisions: Revisions,
) -> list[Question]:
    """Return the first usable questions that are not scored themselves."""
    source = few_shot_source(entry)
    if source is None or entry.few_shot is None:
        return []
    scored = {(question.text, question.options) for question in questions}
    rows = open_source(source, "questions", revisions)
    read = question_reader(source, forms).items(rows)
    others = (question for question in read if (question.text, question.options) not in scored)
    examples = list(islice(others, entry.few_shot.examples))
    if len(examples) < entry.few_shot.examples:
        raise UsageError(
            f"evals.multiple_choice '{entry.name}': few_shot.examples is "
            f"{entry.few_shot.examples}, but split '{source.split}' has only {len(examples)} "
            "usable questions that are not scored themselves; name another split, or set limit"
        )
    return examples


# Tasks with free answers


@dataclass(frozen=True)
class TextTask:
    """Examples to answer, with the metric that compares an answer with the response."""

    entry: TextEval
    revision: str | None
    examples: list[Example]
    rows: RowCounts
    metric: Metric


def load_text_task(
    entry: TextEval, held_out: Sequence[Example], revisions: Revisions = NONE
) -> TextTask:
    """Load the first `limit` usable examples of the entry's dataset, or of the held-out ones.

    Raises:
        UsageError: no example is usable.
    """
    mapper = ExampleMapper(entry)
    reader = RowReader(lambda row, number: replace(mapper(row), id=str(number + 1)))
    if entry.dataset == HELD_OUT:
        revision, candidates = None, iter(held_out)
    else:
        source = open_source(entry, "dialogues", revisions)
        revision, candidates = source.revision, reader.items(source)
    labels = entry.labels
    if entry.metric == "label" and labels is None:
        first = list(islice(candidates, entry.limit))
        responses = (split_thoughts(example.response)[1] or example.response for example in first)
        labels = sorted({response.strip() for response in responses})
        candidates = iter(first)
    metric = make_metric(entry, labels or ())

    def is_usable(example: Example) -> bool:
        if metric.expected(example.response) is not None:
            return True
        reader.dropped[f"the expected response is not a {entry.metric}"] += 1
        return False

    examples = list(islice(filter(is_usable, candidates), entry.limit))
    if not examples:
        raise UsageError(
            f"evals.tasks '{entry.name}': no usable example in {entry.dataset}: {reader.reasons}"
        )
    dropped = dict(reader.dropped.most_common())
    if dropped:
        logs.get().warning("examples dropped", eval=entry.name, rows=reader.rows, reasons=dropped)
    counts = RowCounts(raw=reader.rows or len(held_out), valid=len(examples), dropped=dropped)
    return TextTask(entry, revision, examples, counts, metric)


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


def side_by_side_examples(held_out: Sequence[Example], section: SideBySideEval) -> list[Example]:
    """Return the first held-out examples, then the spec's own prompts, whose response is empty."""
    own = [
        Example(f"prompt-{number}", (Message("user", prompt), Message("assistant", "")))
        for number, prompt in enumerate(section.prompts, 1)
    ]
    return [*held_out[: section.max_examples], *own]


# Replies to lines


def _fields(reply: Reply) -> dict[str, Any]:
    """Return the fields that a reply gives any line."""
    names = ("answer", "thoughts", "error", "final", "provider", "model")
    return {name: getattr(reply, name) for name in names}


def choice_lines(task: Task, replies: Iterable[Reply]) -> list[ChoiceLine]:
    """Return the lines of generated answers to a task's questions, in order."""
    return [
        choice_line(
            question,
            parse_choice(reply.answer, question.options) if reply.answer else None,
            finish=reply.finish or "stop",
            **_fields(reply),
        )
        for question, reply in zip(task.questions, replies, strict=True)
    ]


def text_lines(task: TextTask, replies: Sequence[Reply]) -> list[TextLine]:
    """Return the scored lines of the answers to a task's prompts, in order."""
    answers = [
        Answer(example.prompt, example.response, reply.answer or "")
        for example, reply in zip(task.examples, replies, strict=True)
    ]
    graded = task.metric.grade(answers)
    lines = []
    for example, (score, parsed), reply in zip(task.examples, graded, replies, strict=True):
        fields = _fields(reply) | {"score": score, "finish": reply.finish or "stop"}
        if task.entry.metric in READING:
            fields |= {"target": task.metric.expected(example.response), "parsed": parsed}
        fields |= {"id": example.id, "prompt": example.prompt, "expected": example.response}
        lines.append(TextLine.model_validate(fields))
    return lines


def dialogue_lines(examples: Iterable[Example], replies: Iterable[Reply]) -> list[DialogueLine]:
    """Return the scored lines of the answers to held-out prompts, in order."""
    return [
        DialogueLine(
            id=example.id,
            prompt=example.prompt,
            expected=example.response,
            tokens=reply.completion_tokens,
            finish=reply.finish or "none",
            **(_fields(reply) | {"answer": reply.answer or ""}),
            **overlap_scores(example.response, reply.answer or ""),
        )
        for example, reply in zip(examples, replies, strict=True)
    ]


def side_lines(examples: Iterable[Example], replies: Iterable[Reply]) -> list[SideLine]:
    """Return the lines of answers to read, in order."""
    return [
        SideLine(id=each.id, prompt=each.prompt, expected=each.response or None, **_fields(reply))
        for each, reply in zip(examples, replies, strict=True)
    ]
