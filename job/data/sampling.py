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
    """Keeps the examples with the smallest seeded hashes seen so far."""

    def __init__(self, seed: int, train: int | Literal["all"], validation: int) -> None:
        self._seed = seed
        self._train = train
        self._validation = validation
        # A copy of a held-out example takes a place and is then left out; leave room for some.
        self._room = None if train == "all" else train + 2 * validation + 64
        self._heap: list[tuple[int, int, Example]] = []
        self._seen = 0

    def add(self, example: Example) -> None:
        """Consider one example."""
        self._seen += 1
        entry = (-sample_key(self._seed, example.id), -self._seen, example)
        if self._room is None or len(self._heap) < self._room:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def split(self) -> Split:
        """The choice.

        Raises:
            UsageError: there are fewer examples than the spec asks for.
        """
        ordered = [entry[2] for entry in sorted(self._heap, key=lambda e: (-e[0], -e[1]))]
        validation = ordered[: self._validation]
        held_out = {example.id for example in validation}
        train = [example for example in ordered[self._validation :] if example.id not in held_out]
        wanted = 1 if self._train == "all" else self._train
        if len(validation) < self._validation or len(train) < wanted:
            raise UsageError(
                f"data: the spec asks for {self._train} examples to train on and "
                f"{self._validation} held out, but the dataset has {self._seen} usable rows; "
                "lower data.train_examples or data.validation_examples"
            )
        return Split(train if self._train == "all" else train[: self._train], validation)
