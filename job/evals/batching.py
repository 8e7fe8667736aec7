"""Batches of prompts in few shapes, so that few programs are compiled.

For generation, prompts are sorted by length and padded to one of a few bucket lengths. For
loglikelihoods several prompts share a row, packed as in training.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from job.data.packing import best_fit, lay_out

PACKED_LENGTH = 512
"""Length of packed rows in tokens, unless a prompt is longer."""

BATCHING_VERSION = 5
"""Increase it when prompts are batched or results cached differently: caches become invalid."""

CPU_COMPILE_TOKENS = 2_000
"""Tokens a CPU processes in the time one more program takes to compile: an order of magnitude."""

COMPILE_TOKENS = 1_000_000
"""Tokens an accelerator processes in that time."""

_WIDTH_MULTIPLE = 8
_LENGTH_MULTIPLE = 32


def round_length(length: int) -> int:
    """Round a length up to a multiple of 32."""
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def padded_lengths(longest: Sequence[int], rows: int, compile_tokens: int) -> list[int]:
    """Choose the bucket length of each batch that minimizes processing plus compile time.

    Args:
        longest: tokens of the longest prompt of each batch, ascending.
        rows: rows of a batch.
        compile_tokens: tokens processed in the time one more bucket takes to compile.
    """
    batches = sorted(Counter(map(round_length, longest)).items())
    # For the batches up to each length: the lowest cost, and the lengths that have it.
    best: list[tuple[int, list[int]]] = [(0, [])]
    for end, (length, _) in enumerate(batches, 1):
        choices = []
        for begin, (cost, lengths) in enumerate(best):
            count = sum(count for _, count in batches[begin:end])
            cost += count * rows * length + compile_tokens
            choices.append((cost, lengths + [length] * count))
        best.append(min(choices, key=lambda choice: choice[0]))
    return best[-1][1]


@dataclass(frozen=True)
class PaddedPrompts:
    """A batch with one prompt per row; extra rows repeat the last prompt."""

    indices: list[int]
    """Index of each prompt of the batch among all prompts, in the order of its results."""
    tokens: np.ndarray
    """int32 `[rows, length]`, padded on the right."""
    lengths: np.ndarray
    """int32 `[rows]`."""


@dataclass(frozen=True)
class PackedPrompts:
    """A batch with one or more prompts per row."""

    indices: list[int]
    """As in `PaddedPrompts`."""
    tokens: np.ndarray
    """int32 `[rows, length]`."""
    segment_ids: np.ndarray
    """int32 `[rows, length]`; 0 is padding, 1.. are prompts."""
    ends: np.ndarray
    """int32 `[devices, width]`: where each prompt ends in the flattened rows of a device."""
    end_indices: tuple[np.ndarray, np.ndarray]
    """Index of each prompt in `ends`: device and column."""


def even_batch_size(count: int, most: int, devices: int) -> int:
    """Return the rows per batch that spread `count` rows evenly: a multiple of `devices`."""
    batches = -(-count // most)
    return -(-count // (batches * devices)) * devices


def batch_by_length(
    prompts: Sequence[list[int]], most: int, devices: int, pad_id: int, compile_tokens: int
) -> Iterator[PaddedPrompts]:
    """Yield batches of at most `most` prompts of similar length; see `padded_lengths`."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    # A CPU program of one row (matrix-vector products) takes XLA far longer to compile.
    rows = max(even_batch_size(len(order), most, devices), min(2, most)) if order else 1
    groups = [order[start : start + rows] for start in range(0, len(order), rows)]
    buckets = padded_lengths([len(prompts[group[-1]]) for group in groups], rows, compile_tokens)
    for indices, length in zip(groups, buckets, strict=True):
        filled = indices + [indices[-1]] * (rows - len(indices))
        lengths = np.array([len(prompts[i]) for i in filled], np.int32)
        tokens = np.full((rows, length), pad_id, np.int32)
        for row, index in enumerate(filled):
            tokens[row, : lengths[row]] = prompts[index]
        yield PaddedPrompts(indices, tokens, lengths)


def batch_packed(
    prompts: Sequence[list[int]], most: int, devices: int, compile_tokens: int, *, packing: bool
) -> Iterator[PackedPrompts]:
    """Yield batches of about `most` prompts, several per row if `packing`.

    The devices share a batch's rows equally; see `padded_lengths` for `compile_tokens`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not prompts:
        return
    if packing:
        rows, length, bins = _pack(lengths, most, devices)
    else:
        bins = [[index] for index in sorted(range(len(prompts)), key=lengths.__getitem__)]
        rows = even_batch_size(len(bins), most, devices)
    batches = [bins[start : start + rows] for start in range(0, len(bins), rows)]
    if packing:
        buckets = [length] * len(batches)
    else:
        longest = [lengths[batch[-1][0]] for batch in batches]
        buckets = padded_lengths(longest, rows, compile_tokens)
    rows_per_device = rows // devices
    most_prompts = max(
        sum(map(len, batch[start : start + rows_per_device]))
        for batch in batches
        for start in range(0, len(batch), rows_per_device)
    )
    width = -(-most_prompts // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    for batch, length in zip(batches, buckets, strict=True):
        yield _fill_rows(prompts, batch, (rows, length), (devices, width))


def _pack(lengths: Sequence[int], most: int, devices: int) -> tuple[int, int, list[list[int]]]:
    """Return the rows per batch, the row length, and the prompt indices of each row.

    The row length is the shortest that needs no more batches than the initial one.
    """
    length = packed_length(max(lengths))
    bins = best_fit(lengths, length)
    most = max(devices, packed_rows(most, sum(lengths) / len(lengths), length))
    rows = even_batch_size(len(bins), most, devices)
    max_rows = -(-len(bins) // rows) * rows
    while length - _LENGTH_MULTIPLE >= round_length(max(lengths)):
        shorter = best_fit(lengths, length - _LENGTH_MULTIPLE)
        if len(shorter) > max_rows:
            break
        length, bins = length - _LENGTH_MULTIPLE, shorter
    return rows, length, bins


def packed_length(longest: int) -> int:
    """Return the initial length of packed rows, given the longest prompt's."""
    return max(PACKED_LENGTH, round_length(longest))


def packed_rows(prompts: int, mean: float, length: int) -> int:
    """Return the number of rows of `length` tokens that prompts of a mean length fill."""
    return max(1, round(prompts * mean / length))


def _fill_rows(
    prompts: Sequence[list[int]],
    bins: Sequence[Sequence[int]],
    shape: tuple[int, int],
    ends_shape: tuple[int, int],
) -> PackedPrompts:
    """Lay out prompts in rows; `bins` holds the prompt indices of each row."""
    tokens, segment_ids = lay_out(prompts, bins, shape)
    following = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    is_end = (segment_ids > 0) & (segment_ids != following)
    devices, places = np.nonzero(is_end.reshape(ends_shape[0], -1))
    end_indices = devices, np.arange(len(devices)) - np.searchsorted(devices, devices)
    ends = np.zeros(ends_shape, np.int32)
    ends[end_indices] = places
    indices = [index for row in bins for index in row]
    return PackedPrompts(indices, tokens, segment_ids, ends, end_indices)
