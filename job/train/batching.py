"""Which rows each optimizer step takes: a function of the seed and the step alone."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.machine.memory import (
    LOGITS_SLICE_BYTES,
    USABLE_SHARE,
    device_memory,
    divisors,
    largest_divisor,
)
from job.model.language_model import LanguageModel
from job.runtime import logs
from job.spec.schema import Train
from job.train.step import StepConfig, padded_loss_count, row_bytes, shard_input

_WINDOW = 32
"""Steps whose rows are sorted by length together, so that a step holds rows of like lengths."""


@lru_cache(maxsize=2)
def _order(plan: "BatchSchedule", epoch: int) -> np.ndarray:
    """The rows of an epoch, step after step: a seeded permutation.

    Where lengths differ, windows of it are sorted, and then their steps permuted.
    """
    generator = np.random.default_rng([plan.seed, epoch])
    order = generator.permutation(plan.rows)
    lengths = np.array(plan.lengths, np.int32)
    if len(set(plan.lengths)) < 2:
        return order
    whole = plan.rows // plan.batch_size * plan.batch_size
    size = _WINDOW * plan.batch_size
    windows = [order[start : start + size] for start in range(0, whole, size)]
    windows = [window[: whole - number * size] for number, window in enumerate(windows)]
    ordered = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
    steps = np.concatenate([np.zeros(0, int), *ordered]).reshape(-1, plan.batch_size)
    return np.concatenate([generator.permutation(steps).reshape(-1), order[whole:]])


@dataclass(frozen=True)
class BatchSchedule:
    """Which rows each step takes."""

    rows: int
    batch_size: int
    epochs: int
    seed: int
    lengths: tuple[int, ...] = ()
    """What each row is padded to; nothing where all are alike."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def batch_indices(self, step: int) -> np.ndarray:
        """Row numbers of a step; the last step of an epoch is filled up with -1."""
        epoch, place_in_epoch = divmod(step, self.steps_per_epoch)
        order = _order(self, epoch)
        chosen = order[place_in_epoch * self.batch_size : (place_in_epoch + 1) * self.batch_size]
        return np.pad(chosen, (0, self.batch_size - len(chosen)), constant_values=-1)


class DeviceMemoryError(Exception):
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
            raise DeviceMemoryError from error
        raise


class StepBatches:
    """The rows of each step, as the devices take them."""

    def __init__(
        self,
        train: Train,
        model: LanguageModel,
        rows: PackedRows,
        plan: BatchSchedule,
        recipe: StepConfig,
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

    def _first(self, recipe: StepConfig, state: Sequence[Any]) -> int:
        """The spec's number, or an estimate of what fits."""
        if self._train.micro_batch != "auto":
            return self._train.micro_batch
        length = self._rows.buckets[-1]
        most = int(np.count_nonzero(self._rows.batch.weights, axis=1).max(initial=1))
        row = row_bytes(self._model, recipe, length, padded_loss_count(most))
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
                f"{self._rows.buckets[-1]} tokens do not fit into a device's memory; {ways}"
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
        rows = self._plan.batch_indices(step)
        length = self._length(rows)
        batch = self._rows.batch.take(rows, length)
        width = self.width(length)
        return batch, shard_input(self._model, batch, self._accumulation, width, step, stop=stop)

    def width(self, length: int) -> int:
        """The width that holds the losses of a device in any part of any step of this length.

        The least there is where no step has rows of it.
        """
        key = (self.at_once, length)
        if key not in self._widths:
            groups = self._accumulation * self._model.devices
            counts = np.append(np.count_nonzero(self._rows.batch.weights, axis=1), 0)
            steps = (self._plan.batch_indices(step) for step in range(self._plan.steps))
            most = (
                int(counts[rows].reshape(groups, -1).sum(axis=1).max())
                for rows in steps
                if self._length(rows) == length
            )
            self._widths[key] = padded_loss_count(max(most, default=1))
        return self._widths[key]

    def _length(self, rows: np.ndarray) -> int:
        """What the rows of a step are padded to."""
        return int(self._rows.lengths[rows[rows >= 0]].max())


_WORKING = 1.25
"""What a backward pass holds at its fullest, over what it was given to keep."""


def held_bytes(arrays: Sequence[jax.Array]) -> int:
    """Bytes that one device holds of some arrays."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def rows_that_fit(rows: int, row_bytes: int, held: int, memory: int) -> int:
    """The most of a device's `rows`, a divisor of them, that fit beside what it holds.

    Args:
        row_bytes: kept for the backward pass of a row.
        held: bytes of weights, adapter and optimizer.
        memory: bytes of the device.
    """
    free = USABLE_SHARE * memory - held - 2 * LOGITS_SLICE_BYTES
    return largest_divisor(rows, lambda n: n * row_bytes * _WORKING <= free)
