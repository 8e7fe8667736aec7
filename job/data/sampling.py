"""Which examples are trained on and which are held out: the smallest seeded hashes.

Each example is hashed with the seed; the smallest hashes are held out, the next are trained
on. The choice does not depend on the order of the rows or on how they are stored, one pass
is enough, and only what may be chosen is kept in memory. An example with the same content
as a held-out one is never trained on.
"""

import hashlib
import heapq
from dataclasses import dataclass
from typing import Literal

from job.data.examples import Example
from job.errors import UsageError


def sample_key(seed: int, example_id: str) -> int:
    """A 64-bit number that orders examples at random, the same on every machine."""
    text = f"{seed}:{example_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Split:
    """The chosen examples, each list in the order of the seeded hashes."""

    train: list[Example]
    validation: list[Example]


class Sampler:
    """Keeps the examples with the smallest seeded hashes seen so far.

    Copies of an example have its hash; they are counted, not kept.
    """

    def __init__(self, seed: int, train: int | Literal["all"], validation: int) -> None:
        self._seed = seed
        self._train = train
        self._validation = validation
        self._room = None if train == "all" else train + validation
        self._largest_first: list[tuple[int, str]] = []
        self._kept: dict[str, tuple[Example, int]] = {}
        self._seen = 0

    def add(self, example: Example) -> None:
        """Consider one example."""
        self._seen += 1
        if example.id in self._kept:
            first, copies = self._kept[example.id]
            self._kept[example.id] = (first, copies + 1)
            return
        entry = (-sample_key(self._seed, example.id), example.id)
        if self._room is not None and len(self._kept) == self._room:
            dropped = heapq.heappushpop(self._largest_first, entry)
            if dropped == entry:
                return
            del self._kept[dropped[1]]
        else:
            heapq.heappush(self._largest_first, entry)
        self._kept[example.id] = (example, 1)

    def split(self) -> Split:
        """The choice: held-out examples are all different, and none is trained on.

        Raises:
            UsageError: there are fewer examples than the spec asks for.
        """
        ordered = [
            self._kept[identity] for _, identity in sorted(self._largest_first, reverse=True)
        ]
        validation = [example for example, _ in ordered[: self._validation]]
        train = [example for example, copies in ordered[self._validation :] for _ in range(copies)]
        wanted = 1 if self._train == "all" else self._train
        if len(validation) < self._validation or len(train) < wanted:
            raise UsageError(
                f"data: the spec asks for {self._train} examples to train on and "
                f"{self._validation} held out, but the dataset has {self._seen} usable rows, "
                f"{len(train) + len(validation)} of which are enough apart; "
                "lower data.train_examples or data.validation_examples"
            )
        return Split(train if self._train == "all" else train[: self._train], validation)
