"""The choice of examples depends on their content and the seed, and on nothing else."""

import random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.examples import Example
from job.data.sampling import Sampler, Split, sample_key
from job.errors import UsageError


def examples(count: int, start: int = 0) -> list[Example]:
    return [Example(f"id-{n}", None, f"p{n}", f"r{n}") for n in range(start, start + count)]


def choose(
    rows: list[Example], train: int | Literal["all"], validation: int, seed: int = 0
) -> Split:
    sampler = Sampler(seed, train, validation)
    for example in rows:
        sampler.add(example)
    return sampler.split()


def ids(chosen: list[Example]) -> list[str]:
    return [example.id for example in chosen]


@given(st.randoms(use_true_random=False), st.sampled_from([5, 100, "all"]))
@settings(deadline=None, max_examples=30)
def test_the_choice_does_not_depend_on_the_order_of_the_rows(
    shuffler: random.Random, train: int | Literal["all"]
) -> None:
    rows = examples(400)
    expected = choose(rows, train, 20)
    shuffler.shuffle(rows)
    assert choose(rows, train, 20) == expected


@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None)
def test_as_many_as_asked_for_are_chosen_and_none_twice(
    train: int, validation: int, seed: int
) -> None:
    split = choose(examples(90), train, validation, seed)
    chosen = ids(split.train) + ids(split.validation)
    assert (len(split.train), len(split.validation)) == (train, validation)
    assert len(set(chosen)) == len(chosen)


def test_all_takes_every_example_that_is_not_held_out() -> None:
    split = choose(examples(50), "all", 10)
    assert sorted(ids(split.train) + ids(split.validation)) == sorted(ids(examples(50)))


def test_the_same_seed_gives_the_same_choice_and_another_seed_another() -> None:
    rows = examples(300)
    assert choose(rows, 50, 20, seed=1) == choose(rows, 50, 20, seed=1)
    first, second = choose(rows, 50, 20, seed=1), choose(rows, 50, 20, seed=2)
    assert set(ids(first.validation)) != set(ids(second.validation))
    assert set(ids(first.train)) != set(ids(second.train))


def test_the_order_of_training_is_not_that_of_the_rows() -> None:
    split = choose(examples(100), "all", 1)
    assert ids(split.train) != sorted(ids(split.train), key=lambda name: int(name[3:]))


def test_more_training_examples_keep_the_held_out_ones_and_the_first() -> None:
    rows = examples(300)
    few, many = choose(rows, 20, 10), choose(rows, 200, 10)
    assert few.validation == many.validation
    assert few.train == many.train[:20]


@pytest.mark.parametrize("train", [30, "all"])
@pytest.mark.parametrize("seed", range(5))
def test_a_duplicate_is_never_on_both_sides(train: int | Literal["all"], seed: int) -> None:
    rows = examples(60) * 3 + examples(20, start=60)
    split = choose(rows, train, 15, seed)
    assert set(ids(split.train)).isdisjoint(ids(split.validation))
    assert len(split.validation) == 15


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_with_duplicates_the_choice_does_not_depend_on_the_order_either(
    shuffler: random.Random,
) -> None:
    rows = examples(60) * 2
    expected = choose(rows, 30, 15)
    shuffler.shuffle(rows)
    assert choose(rows, 30, 15) == expected


@pytest.mark.parametrize(
    ("rows", "train", "validation"),
    [(0, 1, 1), (10, 10, 1), (10, 1, 11), (10, "all", 10), (5, 4, 2)],
)
def test_too_few_rows_are_refused_with_the_numbers(
    rows: int, train: int | Literal["all"], validation: int
) -> None:
    with pytest.raises(UsageError) as refused:
        choose(examples(rows), train, validation)
    message = str(refused.value)
    assert f"asks for {train} examples to train on and {validation} held out" in message
    assert f"has {rows} usable rows" in message
    assert "lower data.train_examples or data.validation_examples" in message


def test_just_enough_rows_are_enough() -> None:
    split = choose(examples(10), 9, 1)
    assert len(split.train) == 9


def test_the_key_is_the_same_on_every_machine() -> None:
    assert sample_key(0, "id-1") == 997295089030926072
    assert sample_key(0, "id-1") != sample_key(1, "id-1")


def test_the_choice_favours_no_row() -> None:
    chosen = [name for seed in range(200) for name in ids(choose(examples(20), 5, 1, seed).train)]
    counts = [chosen.count(f"id-{n}") for n in range(20)]
    assert sum(counts) == 1000
    assert 25 < min(counts) <= max(counts) < 80


def test_many_copies_of_one_row_are_trained_on_or_held_out_but_take_no_other_rows_place() -> None:
    for seed in range(20):
        sampler = Sampler(seed, 3, 2)
        for number in [0] * 500 + list(range(1, 6)):
            sampler.add(Example(str(number), None, "p", "r"))
        split = sampler.split()
        assert len(split.train) == 3
        assert len({example.id for example in split.validation}) == 2
        assert not {e.id for e in split.train} & {e.id for e in split.validation}
