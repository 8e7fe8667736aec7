"""Blocks of rows: what the readers yield and staging checks at a time."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Arrow's name of the compression of each file extension."""

MAX_ROW_BYTES = 128 * 1024 * 1024
MAX_ROWS = 2048
"""Maximum number of rows in a block."""

MAX_BYTES = 2 * 1024 * 1024
"""Bytes read at a time; a block of text holds about as much."""

Row = dict[str, Any]


def open_bytes(path: Path, name: str) -> Any:
    """Open a file as decompressed bytes; the extension of its name tells the compression."""
    import pyarrow as pa

    return pa.input_stream(str(path), compression=CODECS.get(Path(name.lower()).suffix))


def unicode_encoding(head: bytes) -> str:
    """Return the Unicode encoding that the first bytes of a text file show: UTF-8 or UTF-16."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if head[:1] == b"\0" else "utf-8-sig"


@dataclass(frozen=True)
class RowBlock:
    """A block of rows read one by one."""

    values: list[Row]

    def __len__(self) -> int:
        return len(self.values)

    def rows(self) -> list[Row]:
        """Return the rows as dictionaries."""
        return self.values

    def column(self, name: str) -> "pa.Array | None":
        """Return a column as text; None if a value is neither text nor null."""
        import pyarrow as pa

        texts = [row.get(name) for row in self.values]
        if not all(text is None or isinstance(text, str) for text in texts):
            return None
        try:
            # Arrow takes bytes eight times as fast as it takes str.
            raw = pa.array([None if t is None else t.encode() for t in texts], pa.binary())
        except UnicodeEncodeError:
            return None
        return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)


@dataclass(frozen=True)
class ArrowBlock:
    """A block read as columns."""

    batch: "pa.RecordBatch"

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def rows(self) -> list[Row]:
        """Return the rows as dictionaries."""
        names = self.batch.schema.names
        columns = [_values(column) for column in self.batch.columns]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def column(self, name: str) -> "pa.Array | None":
        """Return a column as text; None if a value is neither text, an integer nor null."""
        import pyarrow as pa

        if name not in self.batch.schema.names:
            return None
        column = self.batch.column(name)
        kind = pa.types
        if kind.is_dictionary(column.type):
            column = column.dictionary_decode()
        of = column.type
        if kind.is_large_string(of) or kind.is_string_view(of) or kind.is_integer(of):
            column = column.cast(pa.string())
        if not kind.is_string(column.type):
            return None
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return None
        return column


Block = RowBlock | ArrowBlock
"""Consecutive rows of a file."""


def _values(column: "pa.Array") -> list[Any]:
    """Return Python values; text that is not UTF-8 has surrogates in it."""
    import pyarrow as pa

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = _decoded(column.cast(_with_bytes(column.type)).to_pylist())
    return _without_nulls(values) if pa.types.is_nested(column.type) else values


def _with_bytes(kind: "pa.DataType") -> "pa.DataType":
    """Return a type with bytes where it has text."""
    import pyarrow as pa

    if isinstance(kind, pa.StructType):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    if isinstance(kind, pa.ListType | pa.LargeListType):
        make = pa.list_ if isinstance(kind, pa.ListType) else pa.large_list
        return make(_with_bytes(kind.value_type))
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.large_binary() if pa.types.is_large_string(kind) else kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    """Return nested values without the keys that Arrow gives an object because another has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
