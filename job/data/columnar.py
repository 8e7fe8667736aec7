"""Blocks of rows to columns of examples: vectorized for text columns, otherwise row by row.

Both ways give the same examples; `examples` defines what a row means.
"""

import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.chat.conversation import Message, Role
from job.data.examples import SEPARATOR, Example, ExampleMapper, RowDroppedError, turns_text
from job.data.row_blocks import Block, Row
from job.spec.fields import template_parts

HISTORY = pa.list_(pa.struct([("prompt", pa.string()), ("response", pa.string())]))
"""Type of the column of the turns before the last prompt."""

_SPACE = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())


@dataclass(frozen=True)
class ExampleColumns:
    """The examples of a block in columns of equal length, and the dropped rows."""

    rows: np.ndarray
    """int64 `[examples]`: the index of each example's row in its block."""
    system: pa.Array
    prompt: pa.Array
    response: pa.Array
    history: pa.Array
    dropped: list[tuple[int, str]] = field(default_factory=list)
    """Index and reason of each dropped row."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> "ExampleColumns":
        """Return the examples chosen by a mask, bool `[examples]`."""
        if chosen.all():
            return self
        mask = pa.array(chosen)
        return ExampleColumns(
            self.rows[chosen],
            self.system.filter(mask),
            self.prompt.filter(mask),
            self.response.filter(mask),
            self.history.filter(mask),
        )

    def dialogues(self) -> pa.Array:
        """Return `examples.turns_text` of each example."""
        if self.history.null_count == len(self.history):
            return pc.binary_join_element_wise(self.prompt, self.response, SEPARATOR)
        columns = (self.history, self.prompt, self.response)
        texts = zip(*(column.to_pylist() for column in columns), strict=True)
        return pa.array([turns_text(turn_texts(*example)) for example in texts], pa.string())


def turn_texts(
    history: Iterable[Mapping[str, str]] | None, prompt: str, response: str
) -> list[str]:
    """Return the texts of the user and the assistant in turn, from values of the columns."""
    earlier = [text for pair in history or () for text in (pair["prompt"], pair["response"])]
    return [*earlier, prompt, response]


def example_from_columns(
    id: str,  # noqa: A002 - a column's name
    system: str | None,
    prompt: str,
    response: str,
    history: Iterable[Mapping[str, str]] | None,
) -> Example:
    """Return the example of one row of a staged or split file."""
    before = [Message("system", system)] if system else []
    texts = turn_texts(history, prompt, response)
    roles: tuple[Role, ...] = ("user", "assistant")
    turns = [Message(roles[n % 2], text) for n, text in enumerate(texts)]
    return Example(id, (*before, *turns))


def to_columns(block: Block, mapper: ExampleMapper) -> ExampleColumns:
    """Return the examples of a block, and the reasons of its dropped rows."""
    return _by_column(block, mapper) or _by_row(block.rows(), mapper)


def _by_row(rows: list[Row], mapper: ExampleMapper) -> ExampleColumns:
    numbers: list[int] = []
    examples: list[Example] = []
    dropped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        try:
            examples.append(mapper(row))
            numbers.append(number)
        except RowDroppedError as reason:
            dropped.append((number, str(reason)))
    return ExampleColumns(
        np.array(numbers, np.int64),
        pa.array([e.system for e in examples], pa.string()),
        pa.array([e.prompt for e in examples], pa.string()),
        pa.array([e.response for e in examples], pa.string()),
        pa.array([_history(e) for e in examples], HISTORY),
        dropped,
    )


def _history(example: Example) -> list[dict[str, str]] | None:
    """Return the turns before the last, as the column has them."""
    texts = [message.content for message in example.turns[:-2]]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in pairs] or None


def _by_column(block: Block, mapper: ExampleMapper) -> ExampleColumns | None:
    """Fill templates from columns of text; None if a column holds anything else."""
    data = mapper.data
    if data.messages or not len(block):
        return None
    columns: dict[str, pa.Array] = {}
    for name in mapper.fields:
        column = block.column(name)
        if column is None:
            return None
        columns[name] = column
    usable = pa.array(np.ones(len(block), bool))
    filled: dict[str, pa.Array] = {}
    for name, template in (
        ("system", data.system),
        ("prompt", data.prompt),
        ("response", data.response),
    ):
        if template is None:
            continue
        literals, fields = template_parts(template)
        if not fields:  # a system text for all
            filled[name] = pa.repeat(literals[0].strip(), len(block))
            continue
        values = [columns[field] for field in fields]
        trimmed = [pc.utf8_trim(column, _SPACE) for column in values]
        if name != "system":
            has_text = [pc.not_equal(pc.binary_length(column), 0) for column in trimmed]
            usable = pc.and_(usable, functools.reduce(pc.or_, has_text))
        if len(fields) == 1 and literals == ["", ""]:
            filled[name] = trimmed[0]
        else:
            pairs = zip(literals, values, strict=False)
            parts = [part for pair in pairs for part in pair] + literals[-1:]
            texts = pc.binary_join_element_wise(*parts, "", null_handling="emit_null")
            filled[name] = pc.utf8_trim(texts, _SPACE)
        usable = pc.and_(usable, filled[name].is_valid())
    mask = np.asarray(pc.fill_null(usable, False).to_numpy(zero_copy_only=False), dtype=bool)
    all_rows = ExampleColumns(
        np.arange(len(block)),
        filled.get("system", pa.nulls(len(block), pa.string())),
        filled["prompt"],
        filled["response"],
        pa.nulls(len(block), HISTORY),
    )
    if mask.all():
        return all_rows
    unusable = np.flatnonzero(~mask)
    rows = block.rows()
    reasons = _by_row([rows[number] for number in unusable], mapper).dropped
    dropped = [(int(unusable[number]), reason) for number, reason in reasons]
    return replace(all_rows.take(mask), dropped=dropped)
