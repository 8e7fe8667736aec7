"""Which rows each optimizer step takes: a function of the seed and the step alone."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_WINDOW = 32
"""Steps whose rows are sorted by length together, so that a step holds rows of like lengths."""


@lru_cache(maxsize=2)
def _order(plan: "Plan", epoch: int) -> np.ndarray:
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
class Plan:
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

    def rows_of(self, step: int) -> np.ndarray:
        """Row numbers of a step; the last step of an epoch is filled up with -1."""
        epoch, place_in_epoch = divmod(step, self.steps_per_epoch)
        order = _order(self, epoch)
        chosen = order[place_in_epoch * self.batch_size : (place_in_epoch + 1) * self.batch_size]
        return np.pad(chosen, (0, self.batch_size - len(chosen)), constant_values=-1)
