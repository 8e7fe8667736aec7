"""Tokenize examples and pack them into rows of one shape, several examples per row or one.

All rows have the same shape, so that one compiled program serves all steps. For each step the
positions with a loss are listed, so that the head, the widest part of the model, is applied only to
them.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example

_BUCKET_MULTIPLE = 16
"""Buckets are multiples of this number of tokens."""


@dataclass(frozen=True)
class TokenExample:
    """A tokenized example; both lists are `[tokens]`."""

    id: str
    token_ids: list[int]
    loss_mask: list[bool]
    """True where the model is trained to predict the token; never the first."""


@dataclass(frozen=True)
class TokenizedExamples:
    """The examples that can be trained on, with counts of the others."""

    examples: list[TokenExample]
    truncated: int
    """The number of examples truncated at the maximum length."""
    dropped: int
    """The number of examples with no token to train on: their prompt leaves no room."""
    used: int = 0
    """The number of examples with a token to train on; one may give several rows."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens."""

    token_ids: np.ndarray
    """int32 `[rows, length]`."""
    segment_ids: np.ndarray
    """int32 `[rows, length]`: the number of the example in its row, from 1; 0 is padding."""
    loss_mask: np.ndarray
    """bool `[rows, length]`: True where the token is to be predicted; never the first of a row."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, rows: np.ndarray, length: int | None = None) -> "Batch":
        """Return rows by index, truncated to `length` tokens; -1 gives an empty row."""
        taken = [
            array[rows, :length] for array in (self.token_ids, self.segment_ids, self.loss_mask)
        ]
        for array in taken:
            array[rows < 0] = 0
        return Batch(*taken)

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return int(np.count_nonzero(self.segment_ids))

    def group_loss_positions(self, groups: int, width: int) -> dict[str, np.ndarray]:
        """List each part's positions with a loss together, padded to `width`.

        Each device holds one part of the rows. A list for each part lets a device apply the head
        to its own tokens only, and averages out how many its rows have.

        Returns:
            `positions` (in the part's tokens, row after row) whose hidden states predict `targets`
            (int32), and `weights` (float32: 1 for a loss, 0 for padding), `[groups, width]` each.
        """
        flat = {
            "positions": np.zeros((groups, width), np.int32),
            "targets": np.zeros((groups, width), np.int32),
            "weights": np.zeros((groups, width), np.float32),
        }
        rows, places = np.nonzero(self.loss_mask.reshape(groups, -1))
        at = rows, np.arange(len(rows)) - np.searchsorted(rows, rows)
        flat["positions"][at] = places - 1
        flat["targets"][at] = self.token_ids[self.loss_mask]
        flat["weights"][at] = 1.0
        return flat


@dataclass(frozen=True)
class PackedRows:
    """The packed rows of a dataset."""

    batch: Batch
    examples: list[list[str]]
    """The ids of the examples in each row."""
    lengths: np.ndarray
    """int32 `[rows]`: the bucket of each row, to which it is padded."""
    longest: int
    """Tokens of the longest example."""

    @property
    def fill(self) -> float:
        """The share of tokens that are not padding."""
        return self.batch.tokens / int(self.lengths.sum())

    @property
    def buckets(self) -> list[int]:
        """The lengths that rows are padded to, sorted."""
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

    Raises:
        UsageError: the chat template cannot render one.
    """
    usable: list[TokenExample] = []
    truncated = dropped = 0
    tokenized = tokenizer.tokenize([example.messages for example in examples])
    for example, rows in zip(examples, tokenized, strict=True):
        ends = [_end(row.loss_mask) for row in rows]
        truncated += any(end > max_length for end in ends)
        before = len(usable)
        for (token_ids, loss_mask), end in zip(rows, ends, strict=True):
            end = min(end, max_length)
            token_ids, loss_mask = token_ids[:end], loss_mask[:end]
            if loss_on == "all":
                loss_mask = [index > 0 for index in range(len(token_ids))]
            if any(loss_mask):
                usable.append(TokenExample(example.id, token_ids, loss_mask))
        dropped += len(usable) == before
    used = len(examples) - dropped
    return TokenizedExamples(usable, truncated, dropped, used)


def _end(loss_mask: Sequence[bool]) -> int:
    """Return the end of the last reply; nothing is learned from what a template adds after it."""
    return max((index + 1 for index, has_loss in enumerate(loss_mask) if has_loss), default=0)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins by best-fit decreasing.

    Each item, longest first, goes into the fullest bin it fits (Johnson et al. 1974: at most
    11/9 of the optimal number of bins, plus 4).

    Returns:
        The indices of the items in each bin.

    Raises:
        ValueError: an item is longer than the capacity.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, bin), sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} of length {length} does not fit into {capacity}")
        index = bisect.bisect_left(free, (length, -1))
        if index == len(free):
            bins.append([item])
            space, number = capacity - length, len(bins) - 1
        else:
            space, number = free.pop(index)
            bins[number].append(item)
            space -= length
        bisect.insort(free, (space, number))
    return bins


def lay_out(
    items: Sequence[Sequence[int]], bins: Sequence[Sequence[int]], shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out the tokens of items in rows; `bins` holds the indices of each row's items.

    Returns:
        The tokens, and the number of each token's item in its row, from 1; 0 is padding. Both are
        int32 `[rows, length]`.
    """
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, indices in enumerate(bins):
        at = 0
        for segment, index in enumerate(indices, 1):
            end = at + len(items[index])
            tokens[row, at:end] = items[index]
            segment_ids[row, at:end] = segment
            at = end
    return tokens, segment_ids


def length_buckets(lengths: Sequence[int], longest: int, count: int) -> list[int]:
    """Return at most `count` buckets with about as many examples each; the last is `longest`."""
    quantiles = np.quantile(lengths, np.arange(1, count) / count) if count > 1 else np.zeros(0)
    rounded = -(-quantiles.astype(int) // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE
    return sorted({min(int(length), longest) for length in rounded} | {longest})


def make_rows(
    examples: Sequence[TokenExample],
    length: int,
    *,
    packing: bool,
    buckets: Sequence[int] = (),
) -> PackedRows:
    """Make rows of `length` tokens.

    Args:
        examples: the tokenized examples.
        length: tokens of a row.
        packing: put several examples into a row, instead of one.
        buckets: shorter lengths to which rows are padded if they fit; ignored with packing.
    """
    if packing:
        bins = best_fit([len(example.token_ids) for example in examples], length)
    else:
        bins = [[number] for number in range(len(examples))]
    tokens = [example.token_ids for example in examples]
    token_ids, segment_ids = lay_out(tokens, bins, (len(bins), length))
    losses = (has_loss for row in bins for number in row for has_loss in examples[number].loss_mask)
    loss_mask = np.zeros(token_ids.shape, bool)
    loss_mask[segment_ids > 0] = np.fromiter(losses, bool)
    batch = Batch(token_ids, segment_ids, loss_mask)
    used = np.count_nonzero(batch.segment_ids, axis=1)
    sizes = np.array([length] if packing else sorted({*buckets, length}), np.int32)
    lengths = sizes[np.searchsorted(sizes, used)]
    ids = [[examples[number].id for number in row] for row in bins]
    return PackedRows(batch, ids, lengths, max(len(example.token_ids) for example in examples))
