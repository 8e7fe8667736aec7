"""Which hashes came before, in eight bytes each.

Sorted arrays that are merged when they are of like size, as in a log-structured merge tree: a
set of Python objects would take ten times the memory. A chance collision of two different
texts among two million has a probability of one in ten million.
"""

import numpy as np


class Seen:
    """A set of 64-bit hashes that grows by arrays."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def repeated(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these came before, in the set or earlier in this very array.

        Args:
            hashes: uint64 `[n]`.

        Returns:
            bool `[n]`.
        """
        ordered = np.sort(hashes)
        if not (ordered[1:] == ordered[:-1]).any() and not self.holds(ordered).any():
            return np.zeros(len(hashes), bool)  # as nearly always
        values, first = np.unique(hashes, return_index=True)
        before = np.ones(len(hashes), bool)
        before[first] = self.holds(values)
        return before

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these are in the set: bool `[n]`; fastest where they are sorted."""
        found = np.zeros(len(hashes), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[place] == hashes
        return found

    def add(self, hashes: np.ndarray) -> None:
        """Put these into the set."""
        fresh = np.unique(hashes)
        self.add_new(fresh[~self.holds(fresh)])

    def add_new(self, hashes: np.ndarray) -> None:
        """Put these, which are all different and not in it yet, into the set."""
        if not len(hashes):
            return
        self._runs.append(np.sort(hashes))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # merges what is sorted already
            self._runs.append(merged)
