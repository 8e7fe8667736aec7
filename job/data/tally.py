"""What became of rows, in numbers that can be added up: for a shard, and for a dataset."""

import json
from collections import Counter
from typing import Any

import numpy as np
from pydantic import BaseModel

_EXACT_BITS = 9
_SHOWN = 300
_MARKS = (50, 90, 99)


class Lengths(BaseModel):
    """A histogram of lengths in characters: exact up to 511, then in steps below 0.4 %."""

    counts: dict[int, int] = {}
    largest: int = 0
    total: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count these lengths, int `[n]`."""
        if not len(lengths):
            return
        values = lengths.astype(np.int64)
        bits = np.frexp(values.astype(float))[1]
        shift = np.maximum(bits - _EXACT_BITS, 0)
        steps, times = np.unique((values >> shift) << shift, return_counts=True)
        self._merge(dict(zip(steps.tolist(), times.tolist(), strict=True)))
        self.largest = max(self.largest, int(values.max()))
        self.total += int(values.sum())

    def join(self, other: "Lengths") -> None:
        """Add what the other has counted."""
        self._merge(other.counts)
        self.largest = max(self.largest, other.largest)
        self.total += other.total

    def _merge(self, counts: dict[int, int]) -> None:
        for step, times in counts.items():
            self.counts[step] = self.counts.get(step, 0) + times

    def percentiles(self) -> dict[str, Any]:
        """Mean, p50, p90, p99 and the largest."""
        steps = sorted(self.counts)
        running = np.cumsum([self.counts[step] for step in steps])
        if not steps:
            return {}
        made: dict[str, Any] = {"mean": round(self.total / int(running[-1]), 1)}
        for mark in _MARKS:
            place = np.searchsorted(running, running[-1] * mark / 100)
            made[f"p{mark}"] = steps[min(int(place), len(steps) - 1)]
        return made | {"max": self.largest}


class Tally(BaseModel):
    """What became of rows."""

    raw: int = 0
    kept: int = 0
    dropped: dict[str, int] = {}
    """Rows by the reason they were dropped for."""
    found: dict[str, int] = {}
    """Kept examples by the fault they have."""
    shown: dict[str, str] = {}
    """One example of each reason and fault: the beginning of the row or the text."""
    text_bytes: int = 0
    prompt: Lengths = Lengths()
    response: Lengths = Lengths()

    def drop(self, reason: str, times: int, shown: object) -> None:
        """Count rows that are not kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + times
        self._show(reason, shown)

    def find(self, fault: str, times: int, shown: object) -> None:
        """Count examples that are kept in spite of a fault."""
        self.found[fault] = self.found.get(fault, 0) + times
        self._show(fault, shown)

    def knows(self, name: str) -> bool:
        """Whether there is an example of it."""
        return name in self.shown

    def _show(self, name: str, shown: object) -> None:
        if name not in self.shown:
            text = shown if isinstance(shown, str) else json.dumps(shown, default=str)
            self.shown[name] = text[:_SHOWN].encode("utf-8", "backslashreplace").decode()

    def join(self, other: "Tally") -> None:
        """Add what the other has counted; examples that are here already stay."""
        self.raw += other.raw
        self.kept += other.kept
        self.text_bytes += other.text_bytes
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.found = dict(Counter(self.found) + Counter(other.found))
        self.shown = other.shown | self.shown
        self.prompt.join(other.prompt)
        self.response.join(other.response)
