"""The choice of examples depends on their content and the seed, and on nothing else."""

import random
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.split import sample_keys, split
from job.errors import UsageError

Size = int | Literal["all"]


def hashes_of(numbers: list[int]) -> np.ndarray:
    """A hash for each number, as blake2b would give: any 64 bits."""
    generator = np.random.default_rng(7)
    table = generator.integers(0, 2**64, size=max(numbers, default=0) + 1, dtype=np.uint64)
    return table[numbers] if numbers else np.zeros(0, np.uint64)


def choose(
    numbers: list[int], train: Size, validation: int, seed: int = 0, twins: int = 1
) -> tuple[list[int], list[int]]:
    """The numbers chosen to train on and to hold out; each `twins` of them share a group."""
    groups = hashes_of([number // twins for number in numbers])
    chosen = split(seed, hashes_of(numbers), groups, train, validation)
    return [numbers[i] for i in chosen.train], [numbers[i] for i in chosen.validation]


@given(st.randoms(use_true_random=False), st.sampled_from([5, 100, "all"]), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_the_choice_does_not_depend_on_the_order_of_the_rows(
    shuffler: random.Random, train: Size, twins: int
) -> None:
    rows = list(range(400)) + list(range(50))
    expected = choose(rows, train, 20, twins=twins)
    shuffler.shuffle(rows)
    assert choose(rows, train, 20, twins=twins) == expected


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None)
def test_as_many_as_requested_are_chosen_and_none_twice(
    train: int, validation: int, seed: int
) -> None:
    trained, held_out = choose(list(range(90)), train, validation, seed)
    assert (len(trained), len(held_out)) == (train, validation)
    assert len({*trained, *held_out}) == train + validation


def test_all_takes_every_example_that_is_not_held_out() -> None:
    trained, held_out = choose(list(range(50)), "all", 10)
    assert sorted(trained + held_out) == list(range(50))


def test_the_choice_follows_the_seed() -> None:
    rows = list(range(300))
    first, second = choose(rows, 50, 20, seed=1), choose(rows, 50, 20, seed=2)
    assert choose(rows, 50, 20, seed=1) == first
    assert set(first[0]) != set(second[0])
    assert set(first[1]) != set(second[1])


def test_the_order_of_training_is_not_that_of_the_rows() -> None:
    trained, _ = choose(list(range(100)), "all", 1)
    assert trained != sorted(trained)


def test_more_training_examples_extend_the_choice() -> None:
    rows = list(range(300))
    few, many = choose(rows, 20, 10), choose(rows, 200, 10)
    assert few[1] == many[1]
    assert few[0] == many[0][:20]


@pytest.mark.parametrize("train", [30, "all"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("twins", [1, 2])
def test_near_duplicates_are_never_on_both_sides(train: Size, seed: int, twins: int) -> None:
    rows = list(range(60)) * 3 + list(range(60, 120))
    trained, held_out = choose(rows, train, 15, seed, twins)
    assert {n // twins for n in trained}.isdisjoint(n // twins for n in held_out)
    assert len({n // twins for n in held_out}) == 15


@pytest.mark.parametrize(
    ("rows", "train", "validation"),
    [(0, 1, 1), (10, 10, 1), (10, 1, 11), (10, "all", 10), (5, 4, 2)],
)
def test_too_few_rows_are_refused_with_the_numbers(rows: int, train: Size, validation: int) -> None:
    with pytest.raises(UsageError) as refused:
        choose(list(range(rows)), train, validation)
    message = str(refused.value)
    assert f"requests {train} training and {validation} held-out examples" in message
    assert f"has {rows} usable rows" in message
    assert "lower data.train_examples or data.validation_examples" in message


def test_just_enough_rows_are_enough() -> None:
    assert len(choose(list(range(10)), 9, 1)[0]) == 9


def test_the_key_is_the_same_on_every_machine() -> None:
    first, second = sample_keys(0, np.array([1, 2], np.uint64)).tolist()
    assert (first, second) == (627405149472732430, 15549969042648332857)
    assert sample_keys(1, np.array([1], np.uint64))[0] != first


def test_the_choice_favours_no_row() -> None:
    chosen = [n for seed in range(200) for n in choose(list(range(20)), 5, 1, seed)[0]]
    counts = [chosen.count(n) for n in range(20)]
    assert sum(counts) == 1000
    assert 25 < min(counts) <= max(counts) < 80


def test_many_copies_of_one_row_take_no_other_rows_place() -> None:
    for seed in range(20):
        trained, held_out = choose([0] * 500 + list(range(1, 6)), 3, 2, seed)
        assert len(trained) == 3
        assert len(set(held_out)) == 2
        assert not set(trained) & set(held_out)
