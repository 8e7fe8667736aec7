"""What a model is asked: a question as a chat turn, or as lm-evaluation-harness writes it."""

from collections.abc import Sequence
from typing import NamedTuple

from job.data.chat import ChatTemplate
from job.evals.questions import Question, Slice
from job.spec import MultipleChoice
from job.spec_types import LM_EVAL

Prompt = str | list[str]
"""A text, or texts that are tokenized apart: prompts and answers in turn."""

_END = "Answer:"


class BeforeLetter(NamedTuple):
    """What stands before the letter that answers."""

    text: str
    space: str


def lettered(question: Question) -> str:
    """The options of a question, a line each."""
    pairs = zip(question.letters, question.options, strict=True)
    return "\n".join(f"{letter}. {option}" for letter, option in pairs)


def user_turn(entry: MultipleChoice, question: Question) -> str:
    """What the user says: the entry's prompt with the question and its lettered options."""
    if entry.prompt == LM_EVAL:
        return _harness(question)
    return entry.prompt.format(question=question.text, options=lettered(question))


def solved_turns(entry: MultipleChoice, shots: Sequence[Question]) -> list[tuple[str, str]]:
    """The turns before a question: solved ones, each with its letter for an answer."""
    return [(user_turn(entry, shot), shot.gold) for shot in shots]


def question_prompts(found: Slice, template: ChatTemplate) -> list[Prompt]:
    """What a model is given to answer each question of a slice."""
    entry = found.entry
    if entry.prompt == LM_EVAL:
        solved = "".join(f"{_harness(shot)} {shot.gold}\n\n" for shot in found.shots)
        return [solved + _harness(question) for question in found.questions]
    history = solved_turns(entry, found.shots)
    return [
        template.dialogue(user_turn(entry, question), None, history) for question in found.questions
    ]


def before_letter(entry: MultipleChoice) -> BeforeLetter:
    """What the letters are scored after."""
    return BeforeLetter(_END, " ") if entry.prompt == LM_EVAL else BeforeLetter("", "")


def _harness(question: Question) -> str:
    """The prompt of lm-evaluation-harness's task `medmcqa`."""
    return f"Question: {question.text}\nChoices:\n{lettered(question)}\n{_END}"
