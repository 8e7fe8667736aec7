"""Prompts in batches of few shapes, so that few programs are compiled.

Where answers are generated, prompts are sorted by length and padded to one of a few lengths.
Where only letters are scored, several prompts share a row, as examples do in training.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from job.data.packing import best_fit

PACKED = 512
"""Tokens of a row of several prompts, at most, unless one of them is longer."""


LAYOUT = 3
"""Raise it when the same prompts lie in other batches: what was kept of them is measured again."""


CPU_COMPILE_TOKENS = 2_000
"""Tokens that a CPU reads while it compiles one more program: an order of magnitude."""


COMPILE_TOKENS = 1_000_000
"""The same of one accelerator, which reads far more in that time."""


_WIDTH_MULTIPLE = 8


_LENGTH_MULTIPLE = 32


def rounded(length: int) -> int:
    """A length to pad to that holds `length`."""
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def padded_lengths(longest: Sequence[int], rows: int, compile_tokens: int) -> list[int]:
    """The length that each batch is padded to, so that reading and compiling take least time.

    Args:
        longest: tokens of the longest prompt of each batch, in ascending order.
        rows: of a batch.
        compile_tokens: tokens that are read in the time one more length takes to compile.
    """
    batches = sorted(Counter(map(rounded, longest)).items())
    # For the batches up to each length: the least cost, and where its last group begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end, (length, _) in enumerate(batches, 1):
        counts = [count for _, count in batches[:end]]
        best.append(
            min(
                (best[begin][0] + sum(counts[begin:]) * rows * length + compile_tokens, begin)
                for begin in range(end)
            )
        )
    found: list[int] = []
    end = len(batches)
    while end:
        begin = best[end][1]
        held = sum(count for _, count in batches[begin:end])
        found = [batches[end - 1][0]] * held + found
        end = begin
    return found


@dataclass(frozen=True)
class PromptBatch:
    """What all batches have: the numbers of their prompts, in order."""

    prompts: list[int]


@dataclass(frozen=True)
class PaddedPrompts(PromptBatch):
    """One prompt a row; rows beyond those of `prompts` repeat the last."""

    tokens: np.ndarray
    """int32 `[rows, length]`, prompts at the beginning."""
    lengths: np.ndarray
    """int32 `[rows]`."""


@dataclass(frozen=True)
class PackedPrompts(PromptBatch):
    """One prompt a row, or several."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    """int32 `[rows, length]`; segment 0 is padding, 1.. are prompts."""
    ends: np.ndarray
    """int32 `[devices, width]`: the last token of each prompt in a device's rows, row after row."""
    places: tuple[np.ndarray, np.ndarray]
    """Where each prompt's end is in `ends`."""


def even(count: int, most: int, devices: int) -> int:
    """Rows of each batch where `count` rows are shared out evenly: a multiple of `devices`."""
    batches = -(-count // most)
    return -(-count // (batches * devices)) * devices


def batch_by_length(
    prompts: Sequence[list[int]], most: int, devices: int, pad_id: int, compile_tokens: int
) -> Iterator[PaddedPrompts]:
    """Batches of at most `most` prompts of like length; see `padded_lengths`."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows = even(len(order), most, devices) if order else 1
    parts = [order[start : start + rows] for start in range(0, len(order), rows)]
    padded = padded_lengths([len(prompts[part[-1]]) for part in parts], rows, compile_tokens)
    for numbers, length in zip(parts, padded, strict=True):
        filled = numbers + [numbers[-1]] * (rows - len(numbers))
        lengths = np.array([len(prompts[i]) for i in filled], np.int32)
        tokens = np.full((rows, length), pad_id, np.int32)
        for row, number in enumerate(filled):
            tokens[row, : lengths[row]] = prompts[number]
        yield PaddedPrompts(numbers, tokens, lengths)


def batch_packed(
    prompts: Sequence[list[int]], most: int, devices: int, compile_tokens: int, *, packing: bool
) -> Iterator[PackedPrompts]:
    """Batches of about `most` prompts, several of them in a row where `packing` is sound."""
    lengths = [len(prompt) for prompt in prompts]
    if not prompts:
        return
    if packing:
        length = packed_length(max(lengths))
        bins = best_fit(lengths, length)
        most = max(devices, packed_rows(most, sum(lengths) / len(lengths), length))
    else:
        bins = [[number] for number in sorted(range(len(prompts)), key=lengths.__getitem__)]
    rows = even(len(bins), most, devices)
    if packing:
        length, bins = _shortest(lengths, length, bins, -(-len(bins) // rows) * rows)
    parts = [bins[start : start + rows] for start in range(0, len(bins), rows)]
    if packing:
        padded = [length] * len(parts)
    else:
        padded = padded_lengths([lengths[part[-1][0]] for part in parts], rows, compile_tokens)
    each = rows // devices
    widest = max(
        sum(map(len, part[start : start + each]))
        for part in parts
        for start in range(0, len(part), each)
    )
    width = -(-widest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    for part, length in zip(parts, padded, strict=True):
        yield _rows(prompts, part, (rows, length), (devices, width))


def _shortest(
    lengths: Sequence[int], length: int, bins: list[list[int]], rows: int
) -> tuple[int, list[list[int]]]:
    """The least length of so many rows that holds all prompts, from `length` down, and its bins."""
    least = rounded(max(lengths))
    while length - _LENGTH_MULTIPLE >= least:
        shorter = best_fit(lengths, length - _LENGTH_MULTIPLE)
        if len(shorter) > rows:
            break
        length, bins = length - _LENGTH_MULTIPLE, shorter
    return length, bins


def packed_length(longest: int) -> int:
    """Tokens of a row of several prompts, the longest of which has so many."""
    return max(PACKED, rounded(longest))


def packed_rows(prompts: int, mean: float, length: int) -> int:
    """Rows of `length` tokens that hold so many prompts."""
    return max(1, round(prompts * mean / length))


def _rows(
    prompts: Sequence[list[int]],
    bins: Sequence[Sequence[int]],
    shape: tuple[int, int],
    places: tuple[int, int],
) -> PackedPrompts:
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ends = np.zeros(places, np.int32)
    each = shape[0] // places[0]
    taken = [0] * places[0]
    numbers, groups, columns = [], [], []
    for row, held in enumerate(bins):
        at, group = 0, row // each
        for segment, number in enumerate(held, 1):
            end = at + len(prompts[number])
            tokens[row, at:end] = prompts[number]
            segment_ids[row, at:end] = segment
            ends[group, taken[group]] = (row % each) * shape[1] + end - 1
            numbers.append(number)
            groups.append(group)
            columns.append(taken[group])
            taken[group] += 1
            at = end
    return PackedPrompts(numbers, tokens, segment_ids, ends, (np.array(groups), np.array(columns)))
