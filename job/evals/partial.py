"""What the evaluations found so far, on file while they are at work: a killed run goes on there.

A file for each holds whole batches, which are the same in every start of a run, so that the
answers are those of a run never interrupted. It is made for certain inputs; of others it is not
read. Once the stage has written all its predictions, the files are gone.
"""

import contextlib
import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from job import logs
from job.errors import JobError
from job.run import Run
from job.spec_loading import digest

EVERY_SECONDS = 20.0
"""The least time between two writes: what a kill costs at most, beside the batch at work."""


class Partial:
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
        self._batches: dict[str, list[Any]] = json.loads(run.processes.share(self._read))
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
        if self._fresh and self._run.processes.leads:
            content = {"inputs": self._inputs, "batches": self._batches}
            self._run.store.write(self.key, json.dumps(content, ensure_ascii=False).encode())
        self._fresh = False
        self._written = self._clock()


class Progress:
    """The evaluations of one model: their files are written where work stops, and removed after."""

    def __init__(self, run: Run, model: str, inputs: object) -> None:
        """Args: inputs: all that the answers, and the batches they come in, depend on."""
        self._run = run
        self._model = model
        self._inputs = digest(inputs)
        self._open: list[Partial] = []

    def of(self, name: str) -> Partial:
        """What is on file of one evaluation."""
        for partial in self._open:
            partial.write()
        partial = Partial(self._run, f"evals/{self._model}/{name}/partial.json", self._inputs)
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
            elif self._run.processes.leads:
                self._run.store.delete(partial.key)
