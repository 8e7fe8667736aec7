"""The split into training and held-out examples, by seeded hashes.

Each example has a key, a seeded hash of its letters and digits, and a group: the examples with the
same letters and digits in their opening prompt, or what the column `data.group` names. Groups come
in the order of their smallest key. Of the first groups one example per opening prompt is held out;
the other groups are trained on. So no held-out prompt, no conversation that begins like a held-out
one, and no near-duplicate is trained on, unless `data.group` keeps them apart: these are counted.
The choice does not depend on the order or storage of the rows, and needs a few bytes per example.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from job.errors import UsageError


def sample_keys(seed: int, hashes: np.ndarray) -> np.ndarray:
    """Compute the keys that order examples at random, equal on every machine.

    Each is SplitMix64 (Steele, Lea and Flood 2014) of the hash and the seed, so that different
    hashes never share a key.

    Args:
        seed: of the random order.
        hashes: uint64 `[n]`, of each example's letters and digits.

    Returns:
        uint64 `[n]`.
    """
    return _mix(hashes ^ _mix(np.array([seed], np.uint64)))


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
    left_out: int
    """The number of examples on neither side because their group has a held-out one."""
    shared_prompts: int
    """The number of held-out examples whose opening prompt is trained on too, in another group."""


def split(seed: int, hashes: np.ndarray, train: int | Literal["all"], validation: int) -> Split:
    """Choose training and held-out examples.

    Args:
        seed: of the random order.
        hashes: uint64 `[4, n]`, those of `filters.content_hashes`.
        train: number of training examples.
        validation: number of held-out examples.

    Raises:
        UsageError: there are fewer examples than the spec requests.
    """
    exact, normal, prompts, groups = hashes
    order = np.lexsort((exact, sample_keys(seed, normal)))
    ranks = _first_seen(groups[order])
    by_group = np.argsort(ranks, kind="stable")
    codes = _first_seen(prompts[order[by_group]])
    one_per_prompt = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
    chosen = by_group[one_per_prompt[:validation]]
    held_out = order[chosen]
    others = order[ranks > ranks[chosen].max(initial=-1)]
    if len(held_out) < validation or len(others) < (1 if train == "all" else train):
        raise UsageError(
            f"data: the spec requests {train} training and {validation} held-out examples, but "
            f"the dataset has {len(order)} usable rows with {len(one_per_prompt)} different "
            f"opening prompts in {ranks.max(initial=-1) + 1} groups, and a group is never on both "
            "sides; lower data.train_examples or data.validation_examples, or name in data.group "
            "the column that says which rows belong together"
        )
    trained = others if train == "all" else others[:train]
    shared = np.isin(prompts[held_out], prompts[trained])
    left_out = len(order) - len(others) - len(held_out)
    return Split(trained, held_out, left_out, int(shared.sum()))


def _first_seen(values: np.ndarray) -> np.ndarray:
    """Number the different values in the order of their first appearance: uint64 to int `[n]`."""
    return np.asarray(pa.array(values).dictionary_encode().indices)
