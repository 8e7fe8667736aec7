"""A reader of JSON: an array of objects, or objects that follow each other, such as one per line.

The text is streamed, never held in memory. If the caller needs only some columns, Arrow's parser
reads them without creating a Python object for each value; rows it cannot read are read one by
one, with the same result.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.row_blocks import (
    MAX_BYTES,
    MAX_ROW_BYTES,
    MAX_ROWS,
    ArrowBlock,
    Block,
    Row,
    RowBlock,
    open_bytes,
    unicode_encoding,
)
from job.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


_SPACE = re.compile(r"[ \t\r\n]*")
_ROW_BOUNDARY = {
    True: re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)"),
    False: re.compile(r"\}[ \t\r]*\n[ \t\r\n]*(?=\{)"),
}
"""What is between the rows of an array, and between rows that follow each other."""

_SEPARATOR = "\x1e"
_TO_LINES = bytes.maketrans(b"\r\n\x1e", b"\t\t\n")
"""Turns line breaks into tabs, and `_SEPARATOR` into a line break."""

_decode_row = json.JSONDecoder(strict=False).raw_decode


class _Text:
    """A position in the text of a file, which is read piece by piece."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._file = open_bytes(path, name)
        piece = bytes(self._file.read(MAX_BYTES))
        decoder = codecs.getincrementaldecoder(unicode_encoding(piece))("surrogateescape")
        self._decode = decoder.decode
        self.text = self._decode(piece)
        """The current piece of text."""
        self.at = 0
        """The position in `text`."""
        self.at_end = not piece
        self._lines_before = 0
        self._read_size = MAX_BYTES

    def more(self) -> None:
        """Drop the text before the position and read on; pieces grow while a row needs several."""
        self._lines_before += self.text.count("\n", 0, self.at)
        self._read_size = MAX_BYTES if self.at else min(2 * self._read_size, MAX_ROW_BYTES)
        piece = bytes(self._file.read(self._read_size))
        self.at_end = not piece
        self.text = self.text[self.at :] + self._decode(piece, not piece)
        self.at = 0

    def fill(self) -> None:
        """Read until a block of text, or the rest of the file, follows the position."""
        while not self.at_end and len(self.text) - self.at < MAX_BYTES:
            self.more()

    def skip_space(self) -> str:
        """Skip white space; return the next character, or "" at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.at_end:
                return ""
            self.more()

    @property
    def place(self) -> str:
        """The name of the file and the line of the position, for messages."""
        return f"{self._name}:{self._lines_before + self.text.count('\n', 0, self.at) + 1}"


def read_json(path: Path, name: str, columns: Sequence[str] | None) -> Iterator[Block]:
    """Read an array of objects, or objects that follow each other."""
    text = _Text(path, name)
    in_array = text.skip_space() == "["
    text.at += in_array
    first = True
    rows: list[Row] = []
    size = 0
    try:
        while _next_row(text, in_array=in_array, first=first):
            first = False
            if columns and not rows and (block := _columns(text, columns, in_array=in_array)):
                yield block
                continue
            row, length = _row(text)
            rows.append(row)
            size += length
            if len(rows) == MAX_ROWS or size >= MAX_BYTES:
                yield RowBlock(rows)
                rows, size = [], 0
    except UsageError:
        if rows:  # a caller that stops after these never sees the error
            yield RowBlock(rows)
        raise
    if rows:
        yield RowBlock(rows)


def _next_row(text: _Text, *, in_array: bool, first: bool) -> bool:
    """Move to the next row; return False if there is none."""
    character = text.skip_space()
    if not in_array:
        return character != ""
    if character == "," and not first:
        text.at += 1
        character = text.skip_space()
        if character == "]":
            raise UsageError(f"{text.place}: not valid JSON: nothing after the last ','")
    elif character and character != "]" and not first:
        raise UsageError(f"{text.place}: not valid JSON: expected ',' before the row")
    if not character:
        raise UsageError(f"{text.place}: not valid JSON: the array has no end")
    if character != "]":
        return True
    text.at += 1
    if text.skip_space():
        raise UsageError(f"{text.place}: not valid JSON: text after the end of the array")
    return False


def _row(text: _Text) -> tuple[Row, int]:
    """Read one row; return it with its number of characters."""
    while True:
        try:
            row, end = _decode_row(text.text, text.at)
            break
        except ValueError as error:
            if text.at_end or not _may_be_incomplete(error, text.text):
                reason = getattr(error, "msg", error)
                raise UsageError(f"{text.place}: not valid JSON: {reason}") from None
            if len(text.text) - text.at > MAX_ROW_BYTES:
                raise UsageError(f"{text.place}: the row is longer than 128 MB") from None
            text.more()
        except RecursionError:
            raise UsageError(f"{text.place}: not valid JSON: nested too deep") from None
    if not isinstance(row, dict):
        raise UsageError(
            f"{text.place}: a row must be an object with named fields, not {row!r:.60}"
        )
    length, text.at = end - text.at, end
    return row, length


def _may_be_incomplete(error: ValueError, text: str) -> bool:
    """Return whether the error may only be that the row is not read to its end."""
    message, position = getattr(error, "msg", ""), getattr(error, "pos", len(text))
    return message.startswith("Unterminated string") or position > len(text) - 16


def _columns(text: _Text, columns: Sequence[str], *, in_array: bool) -> Block | None:
    """Return the next rows as columns; None if they must be read one by one.

    Rows are split at what looks like the end of one and the begin of the next. Where that is
    inside a row, the parts are not valid JSON, because no JSON string may hold the line breaks
    that replace it.
    """
    text.fill()
    piece = text.text[text.at : text.at + MAX_BYTES]
    *rows, rest = _ROW_BOUNDARY[in_array].split(piece, maxsplit=MAX_ROWS)
    if not rows:
        return None
    lines = f"}}{_SEPARATOR}".join(rows).encode("utf-8", "surrogateescape") + b"}"
    batch = text_columns(lines.translate(_TO_LINES), len(rows), columns)
    if batch is None:
        return None
    place = text.place
    text.at += piece.rindex("}", 0, len(piece) - len(rest)) + 1

    def read() -> list[Row]:
        try:
            values: list[Row] = json.loads(f"[{'},'.join(rows)}}}]", strict=False)
        except RecursionError:
            raise UsageError(f"{place}: not valid JSON: nested too deep") from None
        return values

    return LazyBlock(batch, read)


@dataclass(frozen=True)
class LazyBlock(ArrowBlock):
    """A block with the needed columns; its rows are parsed only on request."""

    read: Callable[[], list[Row]]

    def rows(self) -> list[Row]:
        return self.read()


def text_columns(lines: bytes, count: int, columns: Sequence[str]) -> "pa.RecordBatch | None":
    """Parse columns of text from objects, one per line; missing fields are null.

    Returns:
        None if there are not `count` objects, or a column holds anything but text and nulls.
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
