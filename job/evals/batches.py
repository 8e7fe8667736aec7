"""Prompts in batches of few shapes, so that few programs are compiled.

Where answers are generated, prompts are sorted by length and padded to a rung of a short ladder.
Where only letters are scored, several prompts share a row, as examples do in training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from job.data.packing import best_fit

LADDER = (64, 128, 192, 256, 384, 512, 768, 1024)
PACKED = 512
"""Tokens of a row of several prompts, unless one of them is longer."""
_WIDTH_MULTIPLE = 8


def rung(length: int) -> int:
    """The smallest padded length of the ladder that holds `length`; multiples of 512 above it."""
    for step in LADDER:
        if length <= step:
            return step
    return -(-length // 512) * 512


@dataclass(frozen=True)
class Batch:
    """What all batches have: the numbers of their prompts, in order."""

    prompts: list[int]


@dataclass(frozen=True)
class Prompts(Batch):
    """One prompt a row; rows beyond those of `prompts` repeat the last."""

    tokens: np.ndarray
    """int32 `[rows, length]`, prompts at the beginning."""
    lengths: np.ndarray
    """int32 `[rows]`."""


@dataclass(frozen=True)
class Rows(Batch):
    """One prompt a row, or several."""

    tokens: np.ndarray
    segments: np.ndarray
    """int32 `[rows, length]`; segment 0 is padding, 1.. are prompts."""
    ends: np.ndarray
    """int32 `[devices, width]`: the last token of each prompt in a device's rows, row after row."""
    places: tuple[np.ndarray, np.ndarray]
    """Where each prompt's end is in `ends`."""


def even(count: int, most: int, devices: int) -> int:
    """Rows of each batch where `count` rows are shared out evenly: a multiple of `devices`."""
    batches = -(-count // most)
    return -(-count // (batches * devices)) * devices


def by_length(
    prompts: Sequence[list[int]], most: int, devices: int, pad_id: int
) -> Iterator[Prompts]:
    """Batches of at most `most` prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows = even(len(order), most, devices) if order else 1
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        filled = numbers + [numbers[-1]] * (rows - len(numbers))
        lengths = np.array([len(prompts[i]) for i in filled], np.int32)
        tokens = np.full((rows, rung(int(lengths.max()))), pad_id, np.int32)
        for row, number in enumerate(filled):
            tokens[row, : lengths[row]] = prompts[number]
        yield Prompts(numbers, tokens, lengths)


def in_rows(
    prompts: Sequence[list[int]], most: int, devices: int, *, packing: bool
) -> Iterator[Rows]:
    """Batches of about `most` prompts, several of them in a row where `packing` is sound."""
    lengths = [len(prompt) for prompt in prompts]
    if not prompts:
        return
    if packing:
        length = max(PACKED, rung(max(lengths)))
        bins = best_fit(lengths, length)
        most = max(devices, packed_rows(most, sum(lengths) / len(lengths), length))
    else:
        length = rung(max(lengths))
        bins = [[number] for number in sorted(range(len(prompts)), key=lengths.__getitem__)]
    rows = even(len(bins), most, devices)
    parts = [bins[start : start + rows] for start in range(0, len(bins), rows)]
    each = rows // devices
    widest = max(
        sum(map(len, part[start : start + each]))
        for part in parts
        for start in range(0, len(part), each)
    )
    width = -(-widest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    for part in parts:
        if not packing:
            length = rung(max(lengths[number] for (number,) in part))
        yield _rows(prompts, part, (rows, length), (devices, width))


def packed_rows(prompts: int, mean: float, length: int) -> int:
    """Rows of `length` tokens that hold so many prompts."""
    return max(1, round(prompts * mean / length))


def _rows(
    prompts: Sequence[list[int]],
    bins: Sequence[Sequence[int]],
    shape: tuple[int, int],
    places: tuple[int, int],
) -> Rows:
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ends = np.zeros(places, np.int32)
    each = shape[0] // places[0]
    taken = [0] * places[0]
    numbers, groups, columns = [], [], []
    for row, held in enumerate(bins):
        at, group = 0, row // each
        for segment, number in enumerate(held, 1):
            end = at + len(prompts[number])
            tokens[row, at:end] = prompts[number]
            segments[row, at:end] = segment
            ends[group, taken[group]] = (row % each) * shape[1] + end - 1
            numbers.append(number)
            groups.append(group)
            columns.append(taken[group])
            taken[group] += 1
            at = end
    return Rows(numbers, tokens, segments, ends, (np.array(groups), np.array(columns)))
