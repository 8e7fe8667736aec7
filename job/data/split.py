"""The split into training and held-out examples, by seeded hashes.

Each example has a key, a seeded hash of its letters and digits. The examples with the smallest
keys are held out, the next are trained on. The choice does not depend on the order or storage of
the rows, and needs a few bytes per example. Near-duplicates, which differ only in case, spacing or
punctuation, share a key: no training example has a near-duplicate among the held-out ones.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from job.errors import UsageError

_CHUNK = 65_536
"""Keys computed at a time, to keep intermediate arrays small."""


def sample_keys(seed: int, groups: np.ndarray) -> np.ndarray:
    """Compute the keys that order examples at random, equal on every machine.

    Each is SplitMix64 (Steele, Lea and Flood 2014) of the group and the seed, so that different
    groups never share a key.

    Args:
        seed: of the random order.
        groups: uint64 `[n]`, the hash of each example's letters and digits.

    Returns:
        uint64 `[n]`.
    """
    start = _mix(np.array([seed], np.uint64))
    keys = np.empty_like(groups)
    for at in range(0, len(groups), _CHUNK):
        keys[at : at + _CHUNK] = _mix(groups[at : at + _CHUNK] ^ start)
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
    """Indices of the chosen examples, int64, in the order of their keys."""

    train: np.ndarray
    validation: np.ndarray


def split(
    seed: int,
    hashes: np.ndarray,
    groups: np.ndarray,
    train: int | Literal["all"],
    validation: int,
) -> Split:
    """Choose training and held-out examples.

    Args:
        seed: of the random order.
        hashes: uint64 `[n]`, of each example's content.
        groups: uint64 `[n]`, of its letters and digits.
        train: number of training examples.
        validation: number of held-out examples.

    Raises:
        UsageError: there are fewer examples than the spec requests.
    """
    keys = sample_keys(seed, groups)
    indices = _smallest(keys, None if train == "all" else train + validation, validation)
    order = indices[np.lexsort((indices, hashes[indices], keys[indices]))]
    is_first = np.ones(len(order), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    firsts = np.flatnonzero(is_first)
    held_out = order[firsts[:validation]]
    after = firsts[validation] if len(firsts) > validation else len(order)
    trained = order[after:]
    if len(held_out) < validation or len(trained) < (1 if train == "all" else train):
        raise UsageError(
            f"data: the spec requests {train} training and {validation} held-out examples, but "
            f"the dataset has {len(hashes)} usable rows, {len(held_out) + len(trained)} of them "
            "after near-duplicates across the split are left out; lower data.train_examples or "
            "data.validation_examples"
        )
    return Split(trained if train == "all" else trained[:train], held_out)


def _smallest(keys: np.ndarray, examples: int | None, held_out: int) -> np.ndarray:
    """Return indices of the smallest keys, enough for so many examples in all and held out."""
    count = len(keys)
    size = count if examples is None else examples
    while True:
        size = min(count, 2 * size)
        if size == count:
            return np.arange(count)
        limit = np.partition(keys, size)[size]
        indices = np.flatnonzero(keys <= limit)  # complete groups
        # One example of each held-out group is taken, its near-duplicates are left out.
        groups, sizes = np.unique(keys[indices], return_counts=True)
        left_out = int(sizes[:held_out].sum()) - min(held_out, len(groups))
        if len(groups) > held_out and len(indices) - left_out >= (examples or 0):
            return indices
