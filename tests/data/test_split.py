"""The choice of examples depends on their content and the seed, and on nothing else."""

import random
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.split import Split, sample_keys, split
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
    near = hashes_of([number // twins for number in numbers])
    chosen = split(seed, np.stack([hashes_of(numbers), near, near, near]), train, validation)
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


def choose_groups(
    prompts: list[int], groups: list[int] | None, train: Size, validation: int, seed: int = 0
) -> tuple[list[int], list[int], Split]:
    """Split examples of different content, by their prompts or named groups."""
    content = hashes_of(list(range(len(prompts))))
    by = hashes_of(prompts) if groups is None else hashes_of(groups)
    chosen = split(seed, np.stack([content, content, hashes_of(prompts), by]), train, validation)
    return chosen.train.tolist(), chosen.validation.tolist(), chosen


@pytest.mark.parametrize("train", [60, "all"])
@pytest.mark.parametrize("seed", range(5))
def test_no_held_out_prompt_is_trained_on(train: Size, seed: int) -> None:
    prompts = [number // 4 for number in range(160)]  # four answers to each
    trained, held_out, chosen = choose_groups(prompts, None, train, 15, seed)
    asked = [prompts[number] for number in held_out]
    assert len(set(asked)) == 15
    assert not {prompts[number] for number in trained} & set(asked)
    assert (chosen.left_out, chosen.shared_prompts) == (45, 0)
    assert len(trained) == (100 if train == "all" else 60)


@pytest.mark.parametrize("seed", range(5))
def test_named_groups_are_never_on_both_sides(seed: int) -> None:
    groups = [number // 20 for number in range(200)]
    prompts = [number // 2 for number in range(200)]  # all within one group
    trained, held_out, chosen = choose_groups(prompts, groups, "all", 25, seed)
    assert {groups[n] for n in held_out}.isdisjoint(groups[n] for n in trained)
    assert len({prompts[n] for n in held_out}) == len(held_out) == 25
    assert (len({groups[n] for n in held_out}), len(trained)) == (3, 140)
    assert (chosen.left_out, chosen.shared_prompts) == (35, 0)


def test_prompts_that_named_groups_do_not_separate_are_counted() -> None:
    groups = list(range(100))
    prompts = [number % 50 for number in range(100)]  # each prompt is in two groups
    trained, held_out, chosen = choose_groups(prompts, groups, "all", 10)
    again = [n for n in held_out if prompts[n] in {prompts[m] for m in trained}]
    assert chosen.shared_prompts == len(again) > 5
    assert chosen.left_out == 100 - 10 - len(trained)


def test_a_split_of_different_prompts_is_that_of_examples_alone() -> None:
    trained, held_out, chosen = choose_groups(list(range(60)), None, "all", 10)
    assert (trained, held_out) == choose(list(range(60)), "all", 10)
    assert chosen.left_out == 0
    key = sample_keys(0, hashes_of(list(range(60))))
    assert held_out + trained == np.argsort(key).tolist()


def test_too_few_prompts_are_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"with 1 different opening prompts.*data\.group"):
        choose_groups([0] * 50, None, "all", 2)


def test_many_copies_of_one_row_take_no_other_rows_place() -> None:
    for seed in range(20):
        trained, held_out = choose([0] * 500 + list(range(1, 6)), 3, 2, seed)
        assert len(trained) == 3
        assert len(set(held_out)) == 2
        assert not set(trained) & set(held_out)
