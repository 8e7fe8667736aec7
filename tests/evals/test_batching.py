"""Every prompt is in exactly one batch, at the positions the batch gives."""

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from job.evals.batching import (
    batch_by_length,
    batch_packed,
    even_batch_size,
    padded_lengths,
    round_length,
)

prompts = st.lists(
    st.integers(1, 600).map(lambda length: [length % 50 + 1] * length), min_size=1, max_size=40
)
sizes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 8]))


@given(prompts, sizes)
def test_padded_batches_contain_every_prompt_once(
    given: list[list[int]], size: tuple[int, int]
) -> None:
    each, devices = size
    batches = list(batch_by_length(given, each * devices, devices, 0, 100))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(given)))
    assert len({len(batch.tokens) for batch in batches}) == 1
    for batch in batches:
        assert len(batch.tokens) % devices == 0
        assert len(batch.tokens) <= each * devices
        for row, index in enumerate(batch.indices):
            length = batch.lengths[row]
            assert batch.tokens[row, :length].tolist() == given[index]
            assert not batch.tokens[row, length:].any()


def test_a_single_prompt_has_a_second_row_if_one_is_allowed() -> None:
    assert [len(batch.tokens) for batch in batch_by_length([[5]], 8, 1, 0, 100)] == [2]
    assert [len(batch.tokens) for batch in batch_by_length([[5]], 1, 1, 0, 100)] == [1]


@given(prompts, sizes, st.booleans())
def test_packed_batches_contain_every_prompt_once(
    given: list[list[int]], size: tuple[int, int], packing: bool
) -> None:
    each, devices = size
    batches = list(batch_packed(given, each * devices, devices, 100, packing=packing))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(given)))
    assert len({batch.ends.shape for batch in batches}) == 1
    for batch in batches:
        rows, length = batch.tokens.shape
        flat = batch.tokens.reshape(devices, rows // devices * length)
        segment_ids = batch.segment_ids.reshape(devices, rows // devices * length)
        for index, device, column in zip(batch.indices, *batch.end_indices, strict=True):
            end = batch.ends[device, column] + 1
            begin = end - len(given[index])
            assert flat[device, begin:end].tolist() == given[index]
            (segment,) = set(segment_ids[device, begin:end].tolist())
            assert segment > 0
            assert begin % length + len(given[index]) <= length
        assert np.count_nonzero(batch.segment_ids) == sum(len(given[n]) for n in batch.indices)


def test_rows_are_spread_evenly_over_batches() -> None:
    assert even_batch_size(20, 16, 1) == 10
    assert even_batch_size(33, 16, 8) == 16
    assert even_batch_size(5, 256, 8) == 8
    assert even_batch_size(4183, 256, 8) == 248


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=6).map(sorted)


@given(lengths, st.integers(1, 4), st.integers(0, 800))
def test_bucket_lengths_have_the_lowest_cost(
    longest: list[int], rows: int, compilation: int
) -> None:
    def cost(padded: Sequence[int]) -> int:
        return rows * sum(padded) + compilation * len(set(padded))

    buckets = padded_lengths(longest, rows, compilation)
    own = [round_length(length) for length in longest]
    assert all(a >= b for a, b in zip(buckets, own, strict=True))
    others = [
        choice
        for choice in itertools.product(sorted(set(own)), repeat=len(own))
        if all(a >= b for a, b in zip(choice, own, strict=True))
    ]
    assert cost(buckets) == min(map(cost, others))


def test_a_bucket_must_be_worth_its_compilation() -> None:
    longest = [40, 100, 100, 230]
    assert padded_lengths(longest, 16, 0) == [64, 128, 128, 256]
    assert padded_lengths(longest, 16, 2000) == [128, 128, 128, 256]
    assert padded_lengths(longest, 16, 1_000_000) == [256] * 4


def test_packed_rows_are_as_short_as_possible() -> None:
    given = [[1] * 94] * 20
    (one,) = batch_packed(given[:1], 4, 1, 100, packing=True)
    assert one.tokens.shape == (1, 96)
    # Five prompts a row take 470 tokens.
    shapes = [batch.tokens.shape for batch in batch_packed(given, 16, 1, 100, packing=True)]
    assert shapes == [(2, 480), (2, 480)]
