"""Token examples into rows of one fixed shape: several examples a row, or one.

All rows of a data set have the same shape, so one compiled program serves the whole run.
Only positions with a loss are listed for the head, which is the widest part of the model.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example

_POSITION_MULTIPLE = 8


_LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class TokenExample:
    """A tokenized example; both lists are `[tokens]`."""

    id: str
    token_ids: list[int]
    loss_mask: list[bool]
    """True where the model is trained to predict the token; never the first."""


@dataclass(frozen=True)
class TokenizedExamples:
    """The examples that can be trained on, and the counts of the others."""

    examples: list[TokenExample]
    truncated: int
    """Examples cut at the maximum length."""
    dropped: int
    """Examples whose prompt left no room for a token with a loss."""


@dataclass(frozen=True)
class Batch:
    """Rows as arrays; the first axis is the row.

    token_ids, segment_ids: int32 `[rows, length]`; segment 0 is padding, 1.. are examples.
    positions, targets: int32 `[rows, losses]`: hidden state `positions` predicts `targets`.
    weights: float32 `[rows, losses]`: 1 where there is a loss, 0 where the list is padded.
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, rows: np.ndarray, length: int | None = None) -> "Batch":
        """The rows with these numbers, cut to `length` tokens; -1 is an empty row."""
        empty = rows < 0

        def pick(array: np.ndarray, end: int | None = None) -> np.ndarray:
            chosen: np.ndarray = array[rows, :end]
            chosen[empty] = 0
            return chosen

        return Batch(
            token_ids=pick(self.token_ids, length),
            segment_ids=pick(self.segment_ids, length),
            positions=pick(self.positions),
            targets=pick(self.targets),
            weights=pick(self.weights),
        )

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.segment_ids))

    def losses(self, groups: int) -> np.ndarray:
        """Loss positions of each of `groups` equal parts of the rows."""
        counts: np.ndarray = np.count_nonzero(self.weights, axis=1).reshape(groups, -1).sum(axis=1)
        return counts

    def flat_losses(self, groups: int, width: int) -> dict[str, np.ndarray]:
        """The loss positions of each part of the rows in one list, padded to `width`.

        Part after part of the rows lies on one device: a list a part lets each device apply
        the head to its own tokens only, and averages out how many losses a row has.

        Returns:
            `positions` (into the part's tokens, row after row), `targets` and `weights`,
            `[groups, width]` each.
        """
        rows, length = self.token_ids.shape
        part = rows // groups
        offsets = (np.arange(rows) % part * length)[:, None]
        made = {
            "positions": np.zeros((groups, width), np.int32),
            "targets": np.zeros((groups, width), np.int32),
            "weights": np.zeros((groups, width), np.float32),
        }
        sources = {
            "positions": self.positions + offsets,
            "targets": self.targets,
            "weights": self.weights,
        }
        for group in range(groups):
            chosen = slice(group * part, (group + 1) * part)
            held = self.weights[chosen] > 0
            for name, array in sources.items():
                values = array[chosen][held]
                made[name][group, : len(values)] = values
        return made


@dataclass(frozen=True)
class PackedRows:
    """All rows of a data set, and the examples in each."""

    batch: Batch
    examples: list[list[str]]
    lengths: np.ndarray
    """int32 `[rows]`: what each row is padded to, if its step holds no longer one."""
    longest: int
    """Tokens of the longest example."""

    @property
    def fill(self) -> float:
        """Share of the token slots that hold a token."""
        return self.batch.tokens / int(self.lengths.sum())

    @property
    def buckets(self) -> list[int]:
        """The lengths that rows are padded to."""
        return sorted(set(self.lengths.tolist()))


def tokenize(
    examples: Sequence[Example],
    tokenizer: ChatTokenizer,
    max_length: int,
    loss_on: Literal["response", "all"],
) -> TokenizedExamples:
    """Tokenize examples and truncate them to `max_length` tokens.

    Args:
        examples: the conversations.
        tokenizer: the model's.
        max_length: tokens of an example, at most.
        loss_on: the messages of the assistant, or every token after the first.
    """
    usable: list[TokenExample] = []
    truncated = 0
    conversations = tokenizer.tokenize([example.messages for example in examples])
    for example, (token_ids, loss_mask) in zip(examples, conversations, strict=True):
        truncated += len(token_ids) > max_length
        token_ids, loss_mask = token_ids[:max_length], loss_mask[:max_length]
        if loss_on == "all":
            loss_mask = [place > 0 for place in range(len(token_ids))]
        if any(loss_mask):
            usable.append(TokenExample(example.id, token_ids, loss_mask))
    return TokenizedExamples(usable, truncated, len(examples) - len(usable))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item numbers, none over `capacity`: best-fit decreasing.

    Each item, longest first, goes into the fullest bin it fits (Johnson et al. 1974 bound the
    number of bins by 11/9 of the optimum, plus 4).

    Raises:
        ValueError: an item is longer than the capacity.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free room, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} of length {length} does not fit into {capacity}")
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            bins.append([item])
            room, number = capacity - length, len(bins) - 1
        else:
            room, number = free.pop(place)
            bins[number].append(item)
            room -= length
        bisect.insort(free, (room, number))
    return bins


def length_buckets(lengths: Sequence[int], longest: int, rungs: int) -> list[int]:
    """At most `rungs` lengths to pad to, `longest` the last: each holds as many of the examples."""
    marks = np.quantile(lengths, np.arange(1, rungs) / rungs) if rungs > 1 else np.zeros(0)
    rounded = -(-marks.astype(int) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    return sorted({min(int(mark), longest) for mark in rounded} | {longest})


def make_rows(
    examples: Sequence[TokenExample],
    length: int,
    *,
    packing: bool,
    losses: int | None = None,
    lengths: Sequence[int] = (),
) -> PackedRows:
    """Rows of `length` tokens, packed or with one example each.

    Args:
        losses: width of the lists of loss positions; unset, the most any row needs.
        lengths: shorter lengths that rows of one example are padded to where they fit.
    """
    if packing:
        bins = best_fit([len(example.token_ids) for example in examples], length)
    else:
        bins = [[number] for number in range(len(examples))]
    targets = [np.flatnonzero(example.loss_mask) for example in examples]
    needed = max((sum(len(targets[i]) for i in row) for row in bins), default=1)
    width = -(-needed // _POSITION_MULTIPLE) * _POSITION_MULTIPLE if losses is None else losses
    batch = Batch(
        token_ids=np.zeros((len(bins), length), np.int32),
        segment_ids=np.zeros((len(bins), length), np.int32),
        positions=np.zeros((len(bins), width), np.int32),
        targets=np.zeros((len(bins), width), np.int32),
        weights=np.zeros((len(bins), width), np.float32),
    )
    for row, numbers in enumerate(bins):
        at = count = 0
        for segment, number in enumerate(numbers, 1):
            example = examples[number]
            end = at + len(example.token_ids)
            batch.token_ids[row, at:end] = example.token_ids
            batch.segment_ids[row, at:end] = segment
            places = targets[number]
            losses_here = slice(count, count + len(places))
            batch.targets[row, losses_here] = np.asarray(example.token_ids, np.int32)[places]
            batch.positions[row, losses_here] = at + places - 1
            batch.weights[row, losses_here] = 1.0
            at, count = end, count + len(places)
    used = np.count_nonzero(batch.segment_ids, axis=1)
    steps = np.array([length] if packing else sorted({*lengths, length}), np.int32)
    padded = steps[np.searchsorted(steps, used)]
    names = [[examples[number].id for number in row] for row in bins]
    return PackedRows(batch, names, padded, max(len(example.token_ids) for example in examples))
