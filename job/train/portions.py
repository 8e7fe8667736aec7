"""How many rows a device holds at once, and what of a step's rows follows from that.

What does not fit at once is accumulated; where an estimate was too high, half as many are taken,
with the same result.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from job import logs
from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.model.language_model import LanguageModel
from job.spec import Train
from job.train.memory import device_memory, divisors, held_bytes, rows_that_fit
from job.train.order import Plan
from job.train.step import Recipe, loss_width, place, row_bytes


class OutOfMemory(Exception):
    """The rows that a device holds at once do not fit."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Tell a device's memory running out from other errors.

    Raises:
        OutOfMemory: it did.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory from error
        raise


class Portions:
    """The rows of each step, as the devices take them."""

    def __init__(
        self,
        train: Train,
        model: LanguageModel,
        rows: PackedRows,
        plan: Plan,
        recipe: Recipe,
        state: Sequence[Any],
    ) -> None:
        """Args: state: the arrays that a device holds beside the weights."""
        self._train = train
        self._model = model
        self._rows = rows
        self._plan = plan
        self._widths: dict[tuple[int, int], int] = {}
        self.at_once = self._first(recipe, state)
        """Rows a device holds at once."""

    @property
    def _each(self) -> int:
        """Rows a device has in a step."""
        return self._train.batch_size // self._model.devices

    @property
    def _accumulation(self) -> int:
        return self._each // self.at_once

    def _first(self, recipe: Recipe, state: Sequence[Any]) -> int:
        """The spec's number, or an estimate of what fits."""
        if self._train.micro_batch != "auto":
            return self._train.micro_batch
        length = self._rows.ladder[-1]
        most = int(np.count_nonzero(self._rows.batch.weights, axis=1).max(initial=1))
        row = row_bytes(self._model, recipe, length, loss_width(most))
        held = held_bytes([*self._model.weights, *state])
        memory = device_memory(self._model.mesh.local_devices[0])
        micro = rows_that_fit(self._each, row, held, memory)
        logs.get().info(
            "rows a device holds at once",
            rows=micro,
            accumulated=self._each // micro,
            estimate_mb=round((held + micro * row) / 1e6),
            memory_mb=round(memory / 1e6),
        )
        return micro

    def halve(self) -> None:
        """Take half as many rows at once, or the next divisor below.

        Raises:
            StageError: the spec fixes their number, or it is one already.
        """
        fixed, before = self._train.micro_batch != "auto", self.at_once
        if fixed or before == 1:
            ways = "lower train.micro_batch or set it to auto; " if fixed and before > 1 else ""
            raise StageError(
                f"training: {before} row{'s' if before > 1 else ''} of "
                f"{self._rows.ladder[-1]} tokens do not fit into a device's memory; {ways}"
                "set train.remat to blocks, lower train.max_length and train.pack_length, or "
                "split the weights with runtime.mesh.model"
            )
        self.at_once = next(n for n in divisors(self._each) if n <= before // 2)
        logs.get().warning(
            "out of memory: fewer rows at once, the rest accumulated", rows=self.at_once, was=before
        )

    def take(self, step: int, *, stop: bool = False) -> tuple[Batch, Any]:
        """The rows of a step, on the host and as the compiled step takes them.

        Args:
            stop: this process wants to stop; the step tells the others.
        """
        rows = self._plan.rows_of(step)
        length = self._length(rows)
        batch = self._rows.batch.take(rows, length)
        width = self.width(length)
        return batch, place(self._model, batch, self._accumulation, width, step, stop=stop)

    def width(self, length: int) -> int:
        """The width that holds the losses of a device in any part of any step of this length.

        The least there is where no step has rows of it.
        """
        key = (self.at_once, length)
        if key not in self._widths:
            groups = self._accumulation * self._model.devices
            counts = np.append(np.count_nonzero(self._rows.batch.weights, axis=1), 0)
            steps = (self._plan.rows_of(step) for step in range(self._plan.steps))
            most = (
                int(counts[rows].reshape(groups, -1).sum(axis=1).max())
                for rows in steps
                if self._length(rows) == length
            )
            self._widths[key] = loss_width(max(most, default=1))
        return self._widths[key]

    def _length(self, rows: np.ndarray) -> int:
        """What the rows of a step are padded to."""
        return int(self._rows.lengths[rows[rows >= 0]].max())
