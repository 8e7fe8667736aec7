"""The format of predictions files: a JSON line per answer, the source of all reported numbers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from job.evals.questions import Question

ModelName = Literal["baseline", "finetuned", "reference", "judge"]
DIALOGUE = "dialogue"
SIDE_BY_SIDE = "side_by_side"
JUDGE = "judge"
LOSS = "loss"


@dataclass(frozen=True)
class Reply:
    """A model's answer or the reason there is none, with the usage of all attempts."""

    answer: str | None = None
    """The answer without thoughts; of a local model, empty if it was cut inside them."""
    thoughts: str = ""
    error: str | None = None
    provider: str | None = None
    model: str | None = None
    finish: str | None = None
    """Finish reason: stop, length, ..."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Completion tokens that are reasoning."""
    cost_usd: float = 0.0
    lost: int = 0
    """Attempts whose reply was lost; they may have been billed in addition to `cost_usd`."""
    final: bool = False
    """Whether there is no answer and a repeated request would not give one."""
    sent: bool = True
    """Whether a request was sent."""


class Line(BaseModel):
    """One line of a predictions file."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    id: str
    error: str | None = None
    """Why there is no answer; such a line counts as missing, not as wrong."""
    final: bool = False
    """Whether the error is permanent: a retry would not give an answer."""
    provider: str | None = None
    """Provider that served a remote answer."""
    model: str | None = None
    """Model that gave a remote answer, as the service names it."""
    thoughts: str = ""
    """What a reasoning model wrote before the answer."""


class ChoiceLine(Line):
    """An answer to a multiple-choice question."""

    question: str
    options: list[str]
    gold: str
    choice: str | None
    """Chosen letter; None if the answer named no letter or, see `error`, is missing."""
    correct: bool
    log_probabilities: dict[str, float] | None = None
    """Log-likelihoods by letter, where letters were scored."""
    answer: str | None = None
    """Generated text, where generation was scored."""
    finish: str = "stop"
    """Why generation ended; length: it was cut at the limit of new tokens."""
    group: str | None = None
    """Group to report accuracy by, such as the subject."""

    @property
    def score(self) -> float:
        """1 if the answer is right, otherwise 0."""
        return float(self.correct)


class DialogueLine(Line):
    """An answer to a held-out prompt, with F-measures against the expected answer."""

    prompt: str
    expected: str
    answer: str
    tokens: int
    finish: str
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 - the name the field uses
    chrf: float = 0.0

    @property
    def score(self) -> float:
        """ROUGE-L, which models are compared by."""
        return self.rougeL


class TextLine(Line):
    """An answer to a prompt of a task with free answers, with its score."""

    prompt: str
    expected: str
    answer: str | None
    finish: str = "stop"
    score: float
    target: str | None = None
    """What the metric reads in the expected response, if it reads something."""
    parsed: str | None = None
    """What it reads in the answer; None if the answer is unparsed."""


class LossLine(Line):
    """The cross-entropy of a held-out response."""

    tokens: int
    """Tokens of the response."""
    nats: float
    """Their summed loss."""

    @property
    def score(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


class HarnessLine(Line):
    """A sample of a task of lm-evaluation-harness."""

    metric: str
    score: float
    """Its value of the metric; of perplexities, the log-likelihood of a word or byte."""
    target: str
    answers: list[Any]
    """What the model said, as the task filtered it: texts, or log-likelihoods."""


type ScoredLine = ChoiceLine | DialogueLine | TextLine | HarnessLine | LossLine


class JudgeLine(Line):
    """A judge's choices between two answers to one prompt."""

    prompt: str
    baseline: str
    """The answers as they were shown."""
    finetuned: str
    choices: list[str | None]
    """The model that was chosen, or "tie": with the baseline first, and with it second."""


class SideLine(Line):
    """An answer shown side by side with other models'."""

    prompt: str
    expected: str | None
    answer: str | None


def format_predictions(lines: Iterable[Line]) -> bytes:
    """Return the content of a predictions file."""
    return "".join(
        json.dumps(line.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"
        for line in lines
    ).encode()


def parse_predictions[L: Line](content: bytes, kind: type[L]) -> list[L]:
    """Return the lines in the content of a predictions file."""
    # Not splitlines(): a model's answer may hold any of Unicode's line separators.
    return [kind.model_validate_json(line) for line in content.decode().split("\n") if line]


def choice_line(question: Question, choice: str | None, **rest: Any) -> ChoiceLine:
    """Return the line of an answer to a question; `rest` are further fields of it."""
    return ChoiceLine(
        id=question.id,
        question=question.text,
        options=list(question.options),
        gold=question.gold,
        choice=choice,
        correct=choice == question.gold,
        group=question.group,
        **rest,
    )


def answered[L: Line](lines: Sequence[L]) -> dict[str, L]:
    """Return the lines that have an answer, by id."""
    return {line.id: line for line in lines if line.error is None}


def scores_by_id(lines: Sequence[ScoredLine]) -> dict[str, float]:
    """Return the scores of the lines that have an answer, by id."""
    return {identity: line.score for identity, line in answered(lines).items()}
