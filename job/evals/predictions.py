"""The predictions files: one line an answer, the source of every number in the report."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from job.errors import JobError
from job.evals.tasks import Question
from job.pipeline.run import Run
from job.runtime import logs
from job.spec.load import digest

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


EVERY_SECONDS = 20.0
"""The least time between two writes: what a kill costs at most, beside the batch at work."""


class PredictionCache:
    """The batches of one evaluation of one model that are done (see `engine.Kept`)."""

    def __init__(
        self,
        run: Run,
        key: str,
        inputs: str,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: key: where they are kept in the run; inputs: a digest of what they depend on."""
        self.key = key
        self._run = run
        self._inputs = inputs
        self._every = every_seconds
        self._clock = clock
        self._written = clock()
        self._fresh = False
        # One process reads for all: they must agree on which batches are left.
        self._batches: dict[str, list[Any]] = json.loads(run.processes.broadcast(self._read))
        if self._batches:
            logs.get().info("resumed evaluation", file=key, batches=len(self._batches))

    def _read(self) -> str:
        content = self._run.store.read(self.key)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(content or b"")
            if found["inputs"] == self._inputs:
                return json.dumps(dict(found["batches"]))
        return "{}"

    def get(self, batch: int) -> list[Any] | None:
        """What was found for a batch, or None."""
        return self._batches.get(str(batch))

    def add(self, batch: int, found: list[Any]) -> None:
        """Keep what was found, and write it now and then."""
        self._batches[str(batch)] = found
        self._fresh = True
        if self._clock() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._fresh and self._run.processes.is_primary:
            content = {"inputs": self._inputs, "batches": self._batches}
            self._run.store.write(self.key, json.dumps(content, ensure_ascii=False).encode())
        self._fresh = False
        self._written = self._clock()


class EvalCaches:
    """The evaluations of one model: their files are written where work stops, and removed after."""

    def __init__(self, run: Run, model: str, inputs: object) -> None:
        """Args: inputs: all that the answers, and the batches they come in, depend on."""
        self._run = run
        self._model = model
        self._inputs = digest(inputs)
        self._open: list[PredictionCache] = []

    def of(self, name: str) -> PredictionCache:
        """What is on file of one evaluation."""
        for partial in self._open:
            partial.write()
        partial = PredictionCache(
            self._run, f"evals/{self._model}/{name}/partial.json", self._inputs
        )
        self._open.append(partial)
        return partial

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for partial in self._open:
            if kind is not None:
                with contextlib.suppress(JobError):  # what stopped the work says more
                    partial.write()
            elif self._run.processes.is_primary:
                self._run.store.delete(partial.key)
