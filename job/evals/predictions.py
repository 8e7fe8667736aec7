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
from job.runtime import logs
from job.spec.load import digest
from job.storage.base import Store

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


def format_predictions(lines: Iterable[Line]) -> bytes:
    """Return the content of a predictions file."""
    text = "".join(
        json.dumps(line.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"
        for line in lines
    )
    return text.encode()


def read_predictions[L: Line](store: Store, model: ModelName, name: str, kind: type[L]) -> list[L]:
    """Return the lines of a predictions file; empty where the model has none."""
    content = store.read(predictions_key(model, name))
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
"""Shortest time between two writes: a kill loses at most this much and the current batch."""

Broadcast = Callable[[Callable[[], str]], str]
"""Runs a function on the primary process and returns its text on every process."""


class PredictionCache:
    """Finished batches of one evaluation of one model; implements `engine.BatchCache`."""

    def __init__(
        self,
        store: Store,
        key: str,
        inputs: str,
        broadcast: Broadcast,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the batches that an earlier start finished.

        Args:
            store: of the run; in all processes but the primary one it only reads.
            key: the cache file.
            inputs: digest of everything the answers depend on; other caches are ignored.
            broadcast: makes all processes agree on which batches are left.
            every_seconds: shortest time between two writes.
            clock: seconds, monotonic.
        """
        self.key = key
        self._store = store
        self._inputs = inputs
        self._every = every_seconds
        self._clock = clock
        self._written = clock()
        self._changed = False
        self._batches: dict[str, list[Any]] = json.loads(broadcast(self._read))
        if self._batches:
            logs.get().info("resumed evaluation", file=key, batches=len(self._batches))

    def _read(self) -> str:
        content = self._store.read(self.key)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            cached = json.loads(content or b"")
            if cached["inputs"] == self._inputs:
                return json.dumps(dict(cached["batches"]))
        return "{}"

    def get(self, batch: int) -> list[Any] | None:
        """Return the results of a batch, or None."""
        return self._batches.get(str(batch))

    def add(self, batch: int, results: list[Any]) -> None:
        """Add the results of a batch, and write the file if the last write is long enough ago."""
        self._batches[str(batch)] = results
        self._changed = True
        if self._clock() - self._written >= self._every:
            self.write()

    def write(self) -> None:
        """Write the file if a batch was added since the last write."""
        if self._changed:
            content = {"inputs": self._inputs, "batches": self._batches}
            self._store.write(self.key, json.dumps(content, ensure_ascii=False).encode())
        self._changed = False
        self._written = self._clock()


class EvalCaches:
    """The caches of one model's evaluations: written when work stops, deleted when it is done."""

    def __init__(self, store: Store, model: str, inputs: object, broadcast: Broadcast) -> None:
        """Args: inputs: everything that the answers, and how they are batched, depend on."""
        self._store = store
        self._model = model
        self._inputs = digest(inputs)
        self._broadcast = broadcast
        self._open: list[PredictionCache] = []

    def open(self, name: str) -> PredictionCache:
        """Return the cache of one evaluation."""
        for cache in self._open:
            cache.write()
        key = f"evals/{self._model}/{name}/partial.json"
        cache = PredictionCache(self._store, key, self._inputs, self._broadcast)
        self._open.append(cache)
        return cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for cache in self._open:
            if kind is not None:
                with contextlib.suppress(JobError):  # the error that stopped the work matters more
                    cache.write()
            else:
                self._store.delete(cache.key)
