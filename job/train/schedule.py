"""Which rows each optimizer step takes: a function of the seed and the step number alone."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_WINDOW = 32
"""Steps whose rows are sorted by length together, so that a step has rows of similar lengths."""


@dataclass(frozen=True)
class BatchSchedule:
    """The row numbers of every step, in a seeded order that differs by epoch."""

    rows: int
    batch_size: int
    epochs: int
    seed: int
    lengths: tuple[int, ...] = ()
    """The bucket length of each row; empty if all rows have the same length."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; the last may be partly empty."""
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all epochs."""
        return self.steps_per_epoch * self.epochs

    def batch_indices(self, step: int) -> np.ndarray:
        """Return the row numbers of a step, `[batch_size]`; -1 fills the last of an epoch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch * self.batch_size
        indices = self._orders[epoch][begin : begin + self.batch_size]
        return np.pad(indices, (0, self.batch_size - len(indices)), constant_values=-1)

    @cached_property
    def _orders(self) -> list[np.ndarray]:
        return [self._order(epoch) for epoch in range(self.epochs)]

    def _order(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch in order: a seeded permutation.

        If lengths differ, windows of the permutation are sorted by length and then their steps
        are shuffled.
        """
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.rows)
        lengths = np.array(self.lengths, np.int32)
        if len(set(self.lengths)) < 2:
            return order
        full = self.rows // self.batch_size * self.batch_size
        size = _WINDOW * self.batch_size
        windows = [order[start : min(start + size, full)] for start in range(0, full, size)]
        ordered = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
        steps = np.concatenate([np.zeros(0, int), *ordered]).reshape(-1, self.batch_size)
        return np.concatenate([generator.permutation(steps).reshape(-1), order[full:]])
