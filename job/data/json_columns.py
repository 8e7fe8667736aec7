"""Columns of text out of JSON objects, by Arrow's parser, which takes half the time.

It is as strict as Python's about what JSON is, and refuses what it might read otherwise: a name
that is there twice, half of a surrogate pair, a value that is no text where text is wanted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job.data.blocks import ArrowBlock, Row

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class LazyBlock(ArrowBlock):
    """A block of which the columns that are needed were read, and whole rows are when wanted."""

    read: Callable[[], list[Row]]

    def rows(self) -> list[Row]:
        return self.read()


def text_columns(lines: bytes, count: int, columns: Sequence[str]) -> "pa.RecordBatch | None":
    """Columns of objects, one a line, as text; what an object lacks is null.

    Returns:
        None where these are not `count` objects, or a column holds something else.
    """
    import pyarrow as pa
    import pyarrow.json

    schema = pa.schema([(name, pa.string()) for name in columns])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(lines),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != count:
        return None
    return table.combine_chunks().to_batches()[0]
