"""Blocks of rows to columns of examples: vectorized for text columns, otherwise row by row.

Both ways give the same examples; `examples` defines what a row means.
"""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from job.chat.conversation import Message
from job.data.examples import SEPARATOR, Example, ExampleMapper, RowDroppedError
from job.data.row_blocks import Block, Row
from job.spec.fields import template_parts

COLUMNS = pa.schema([(n, pa.string()) for n in ("system", "prompt", "response", "messages")])
"""Columns of examples; `messages` has all messages as JSON, unless they are those of the others."""

_SPACE = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())


@dataclass(frozen=True)
class ExampleColumns:
    """The examples of a block in columns of equal length, and the dropped rows."""

    rows: np.ndarray
    """int64 `[examples]`: the index of each example's row in its block."""
    batch: pa.RecordBatch
    """The examples, with the schema `COLUMNS`."""
    groups: pa.Array
    """Texts of the column `data.group`; null where the spec names none."""
    dropped: list[tuple[int, str]] = field(default_factory=list)
    """Index and reason of each dropped row."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> "ExampleColumns":
        """Return the examples chosen by a mask, bool `[examples]`."""
        if chosen.all():
            return self
        mask = pa.array(chosen)
        return ExampleColumns(self.rows[chosen], self.batch.filter(mask), self.groups.filter(mask))

    def dialogues(self) -> pa.Array:
        """Return `Example.text` of each example."""
        _, prompts, responses, messages = self.batch.columns
        if messages.null_count == len(self):
            return pc.binary_join_element_wise(prompts, responses, SEPARATOR)
        rows = zip(*(column.to_pylist() for column in self.batch.columns), strict=True)
        return pa.array((example_from_columns("", *row).text for row in rows), pa.string())

    def first_prompts(self) -> Iterator[tuple[int, str]]:
        """Yield index and first prompt of each example with a value of `messages`."""
        column = self.batch["messages"]
        texts = column.to_pylist() if column.null_count < len(self) else []
        for number, text in enumerate(texts):
            if text:
                messages = messages_from_json(text)
                yield number, next(m.content for m in messages if m.role == "user")


def messages_from_json(text: str) -> tuple[Message, ...]:
    """Return the messages of a value of the column `messages`."""
    return tuple(Message(*fields) for fields in json.loads(text))


def example_from_columns(
    id: str,  # noqa: A002 - a column's name
    system: str | None,
    prompt: str,
    response: str,
    messages: str | None = None,
) -> Example:
    """Return the example of one row of a staged or split file."""
    if messages:
        return Example(id, messages_from_json(messages))
    before = [Message("system", system)] if system else []
    return Example(id, (*before, Message("user", prompt), Message("assistant", response)))


def to_columns(block: Block, mapper: ExampleMapper) -> ExampleColumns:
    """Return the examples of a block, and the reasons of its dropped rows."""
    return _by_column(block, mapper) or _by_row(block.rows(), mapper)


def _by_row(rows: list[Row], mapper: ExampleMapper) -> ExampleColumns:
    numbers: list[int] = []
    examples: list[Example] = []
    groups: list[str | None] = []
    dropped: list[tuple[int, str]] = []
    for number, row in enumerate(rows):
        try:
            example, group = mapper(row), mapper.group(row)
            examples.append(example)
            groups.append(group)
            numbers.append(number)
        except RowDroppedError as reason:
            dropped.append((number, str(reason)))
    values = [(e.system, e.prompt, e.response, _messages(e)) for e in examples]
    columns = list(zip(*values, strict=True)) or [()] * len(COLUMNS)
    batch = pa.record_batch([*map(pa.array, columns, COLUMNS.types)], schema=COLUMNS)
    return ExampleColumns(
        np.array(numbers, np.int64), batch, pa.array(groups, pa.string()), dropped
    )


def _messages(example: Example) -> str | None:
    if example.is_plain and len(example.turns) == 2:
        return None
    return json.dumps([astuple(message) for message in example.messages], ensure_ascii=False)


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
    groups = pa.nulls(len(block), pa.string())
    if mapper.group_column:
        groups = columns[mapper.group_column]
        usable = pc.and_(usable, groups.is_valid())
    mask = np.asarray(pc.fill_null(usable, False).to_numpy(zero_copy_only=False), dtype=bool)
    arrays = [filled.get(f.name, pa.nulls(len(block), f.type)) for f in COLUMNS]
    batch = pa.record_batch(arrays, schema=COLUMNS)
    all_rows = ExampleColumns(np.arange(len(block)), batch, groups)
    if mask.all():
        return all_rows
    unusable = np.flatnonzero(~mask)
    rows = block.rows()
    reasons = _by_row([rows[number] for number in unusable], mapper).dropped
    dropped = [(int(unusable[number]), reason) for number, reason in reasons]
    return replace(all_rows.take(mask), dropped=dropped)
