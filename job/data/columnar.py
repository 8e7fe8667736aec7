"""A block of rows as columns of examples: at once where all is text, row by row elsewhere.

Both ways give the same: what a row means is said in `examples`.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.data.blocks import Block, Row
from job.data.examples import SEPARATOR, Example, ExampleMapper, RowDroppedError, Turn, dialogue
from job.spec.fields import template_parts

HISTORY = pa.list_(pa.struct([("prompt", pa.string()), ("response", pa.string())]))


_SPACE = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())


@dataclass(frozen=True)
class ExampleColumns:
    """The examples of a block in columns of equal length, and the rows that gave none."""

    rows: np.ndarray
    """int64 `[examples]`: the number of each example's row in its block."""
    system: pa.Array
    prompt: pa.Array
    response: pa.Array
    history: pa.Array
    dropped: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> "ExampleColumns":
        """The examples where the boolean mask `chosen` is set."""
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
        """What `examples.dialogue` gives for each example."""
        if self.history.null_count == len(self.history):
            return pc.binary_join_element_wise(self.prompt, self.response, SEPARATOR)
        columns = (self.history, self.prompt, self.response)
        texts = zip(*(column.to_pylist() for column in columns), strict=True)
        return pa.array([_dialogue(*example) for example in texts], pa.string())


def _dialogue(history: list[dict[str, str]] | None, prompt: str, response: str) -> str:
    return dialogue([Turn(**turn) for turn in history or []], prompt, response)


def to_columns(block: Block, mapper: ExampleMapper) -> ExampleColumns:
    """The examples of a block's rows, and why each other row gave none."""
    return _by_column(block, mapper) or _by_row(block.rows(), mapper)


def _by_row(rows: list[Row], mapper: ExampleMapper) -> ExampleColumns:
    numbers: list[int] = []
    made: list[Example] = []
    dropped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        try:
            made.append(mapper(row))
            numbers.append(number)
        except RowDroppedError as reason:
            dropped.append((number, str(reason)))
    history = [[turn._asdict() for turn in e.history] if e.history else None for e in made]
    return ExampleColumns(
        np.array(numbers, np.int64),
        pa.array([e.system for e in made], pa.string()),
        pa.array([e.prompt for e in made], pa.string()),
        pa.array([e.response for e in made], pa.string()),
        pa.array(history, HISTORY),
        dropped,
    )


def _by_column(block: Block, mapper: ExampleMapper) -> ExampleColumns | None:
    """The same for templates over columns of text; None where something else is among them."""
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
        given = [columns[field] for field in fields]
        trimmed = [pc.utf8_trim(column, _SPACE) for column in given]
        if name != "system":
            said = _any([pc.not_equal(pc.binary_length(column), 0) for column in trimmed])
            usable = pc.and_(usable, said)
        if len(fields) == 1 and literals == ["", ""]:
            filled[name] = trimmed[0]
        else:
            parts = [p for pair in zip(literals, given, strict=False) for p in pair] + literals[-1:]
            whole = pc.binary_join_element_wise(*parts, "", null_handling="emit_null")
            filled[name] = pc.utf8_trim(whole, _SPACE)
        usable = pc.and_(usable, filled[name].is_valid())
    mask = np.asarray(pc.fill_null(usable, False).to_numpy(zero_copy_only=False), dtype=bool)
    nothing = pa.nulls(len(block), pa.string())
    whole_block = ExampleColumns(
        np.arange(len(block)),
        filled.get("system", nothing),
        filled["prompt"],
        filled["response"],
        pa.nulls(len(block), HISTORY),
    )
    if mask.all():
        return whole_block
    unusable = np.flatnonzero(~mask)
    rows = block.rows()
    refused = _by_row([rows[number] for number in unusable], mapper)
    dropped = [(int(unusable[number]), reason) for number, reason in refused.dropped]
    kept = whole_block.take(mask)
    return ExampleColumns(kept.rows, kept.system, kept.prompt, kept.response, kept.history, dropped)


def _any(masks: list[pa.Array]) -> pa.Array:
    found = masks[0]
    for mask in masks[1:]:
        found = pc.or_(found, mask)
    return found
