"""Which examples are trained on and which are held out: the smallest seeded hashes.

Each example has a key, a seeded hash of its letters and digits. The smallest keys are held
out, the next are trained on. The choice does not depend on the order of the rows or on how
they are stored, and takes a few bytes an example. Examples that differ in case, spacing or
signs only share a key: none is trained on that has a twin among those held out.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from job.errors import UsageError

_AT_ONCE = 65_536
"""Keys that are made at once: what that needs beside them stays small."""


def sample_keys(seed: int, groups: np.ndarray) -> np.ndarray:
    """Numbers that order examples at random, the same on every machine.

    SplitMix64 (Steele, Lea and Flood 2014) of each group, begun from one of the seed: different
    groups never share a key.

    Args:
        groups: uint64 `[n]`, the hash of each example's letters and digits.

    Returns:
        uint64 `[n]`.
    """
    start = _mix(np.array([seed], np.uint64))
    keys = np.empty_like(groups)
    for at in range(0, len(groups), _AT_ONCE):
        keys[at : at + _AT_ONCE] = _mix(groups[at : at + _AT_ONCE] ^ start)
    return keys


def _mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        return z


@dataclass(frozen=True)
class Split:
    """Numbers of the chosen examples, int64, each list in the order of the keys."""

    train: np.ndarray
    validation: np.ndarray


def split(
    seed: int,
    hashes: np.ndarray,
    groups: np.ndarray,
    train: int | Literal["all"],
    validation: int,
) -> Split:
    """Choose among examples with these hashes, uint64 `[n]` each.

    Raises:
        UsageError: there are fewer examples than the spec asks for.
    """
    keys = sample_keys(seed, groups)
    numbers = _smallest(keys, None if train == "all" else train + validation, validation)
    order = numbers[np.lexsort((numbers, hashes[numbers], keys[numbers]))]
    begins = np.ones(len(order), bool)
    begins[1:] = keys[order][1:] != keys[order][:-1]
    firsts = np.flatnonzero(begins)
    held_out = order[firsts[:validation]]
    after = firsts[validation] if len(firsts) > validation else len(order)
    trained = order[after:]
    wanted = 1 if train == "all" else train
    if len(held_out) < validation or len(trained) < wanted:
        raise UsageError(
            f"data: the spec asks for {train} examples to train on and {validation} held out, "
            f"but the dataset has {len(hashes)} usable rows, {len(held_out) + len(trained)} of "
            "which are enough apart; lower data.train_examples or data.validation_examples"
        )
    return Split(trained if train == "all" else trained[:train], held_out)


def _smallest(keys: np.ndarray, wanted: int | None, groups: int) -> np.ndarray:
    """Numbers of at least the `wanted` smallest keys, enough of them of different groups."""
    count = len(keys)
    room = count if wanted is None else wanted
    while True:
        room = min(count, 2 * room)
        if room == count:
            return np.arange(count)
        limit = np.partition(keys, room)[room]
        numbers = np.flatnonzero(keys <= limit)  # whole groups
        # Those held out take one of each group, and leave out its twins.
        values, times = np.unique(keys[numbers], return_counts=True)
        twins = int(times[:groups].sum()) - min(groups, len(values))
        if len(values) > groups and len(numbers) - twins >= (wanted or 0):
            return numbers
