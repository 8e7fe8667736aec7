"""The predictions files: one line an answer, the source of every number in the report."""

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from job.evals.questions import Question
from job.run import Run

ModelName = Literal["baseline", "finetuned", "reference"]
DIALOGUE = "dialogue"
SIDE_BY_SIDE = "side_by_side"


class Line(BaseModel):
    """One line of a predictions file."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    id: str
    error: str | None = None
    """Why there is no answer; such a line counts as missing, not as wrong."""
    final: bool = False
    """Asking the same again would not give an answer either."""
    provider: str | None = None
    """Who answered, where that was a remote service."""
    model: str | None = None
    """The model that answered, by the service's own name."""


class ChoiceLine(Line):
    """An answer to a multiple-choice question."""

    question: str
    options: list[str]
    gold: str
    choice: str | None
    """None: the answer named no letter, or (see `error`) there was none."""
    correct: bool
    log_probabilities: dict[str, float] | None = None
    """By letter, where letters were scored."""
    answer: str | None = None
    """What was generated, where generation was scored."""
    group: str | None = None
    """What accuracy is reported by, such as the subject."""


class DialogueLine(Line):
    """An answer to a held-out prompt; ROUGE F-measures against the expected answer."""

    prompt: str
    expected: str
    answer: str
    tokens: int
    finish: str
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - the name the field uses


class SideLine(Line):
    """An answer shown side by side with other models'."""

    prompt: str
    expected: str | None
    answer: str | None


def predictions_key(model: ModelName, name: str) -> str:
    """Where the predictions of a model on an evaluation are kept."""
    return f"evals/{model}/{name}/predictions.jsonl"


def write_predictions(run: Run, model: ModelName, name: str, lines: Iterable[Line]) -> None:
    """Write a predictions file as an output of the stage at work."""
    text = "".join(
        json.dumps(line.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"
        for line in lines
    )
    run.put(predictions_key(model, name), text.encode())


def read_predictions[L: Line](run: Run, model: ModelName, name: str, kind: type[L]) -> list[L]:
    """The lines of a predictions file; empty where the model has none."""
    content = run.store.read(predictions_key(model, name))
    return [] if content is None else parse_predictions(content, kind)


def parse_predictions[L: Line](content: bytes, kind: type[L]) -> list[L]:
    """The lines of the content of a predictions file."""
    # Not splitlines(): a model's answer may hold any of Unicode's line separators.
    return [kind.model_validate_json(line) for line in content.decode().split("\n") if line]


def choice_line(question: Question, choice: str | None, **rest: object) -> ChoiceLine:
    """The line of an answer to a question."""
    fields: dict[str, object] = {
        "id": question.id,
        "question": question.text,
        "options": list(question.options),
        "gold": question.gold,
        "choice": choice,
        "correct": choice == question.gold,
        "group": question.group,
    }
    return ChoiceLine.model_validate(fields | rest)


def answered[L: Line](lines: Sequence[L]) -> dict[str, L]:
    """By id, the lines that hold an answer."""
    return {line.id: line for line in lines if line.error is None}
