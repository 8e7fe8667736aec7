"""Readers of JSON: one object per line, or one array of objects.

An array is streamed, never held in memory. If the caller needs only some columns, Arrow's parser
reads them without creating a Python object for each value; blocks it cannot read are read row by
row, with the same result.
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
    FilePosition,
    Row,
    RowBlock,
    open_text,
)
from job.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa


_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")
_ROW_BOUNDARY = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")
_SEPARATOR = "\x1e"
_TO_LINES = bytes.maketrans(b"\r\n\x1e", b"\t\t\n")
"""Turns line breaks into tabs, and `_SEPARATOR` into a line break."""


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object with named fields, not {value!r:.60}")
    return value


class _Cursor:
    """A position in the text of a file, which is read piece by piece."""

    def __init__(self, path: Path, name: str, offset: int) -> None:
        self._file = open_text(path, name, offset)
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text = ""
        """The current piece of text."""
        self.at = 0
        """The position in `text`."""
        self.at_end = False
        self._characters_before = 0
        self._counted_to = 0
        self._byte = offset
        self._read_size = MAX_BYTES
        self._at_start = offset == 0

    def more(self) -> None:
        """Drop the text before the position and read on; pieces grow while a row needs several."""
        self._count_bytes()
        self._characters_before += self.at
        self._read_size = MAX_BYTES if self.at else min(2 * self._read_size, MAX_ROW_BYTES)
        piece = bytes(self._file.read(self._read_size))
        if self._at_start and piece.startswith(_BOM):
            self._byte += len(_BOM)
            piece = piece[len(_BOM) :]
        self._at_start = False
        self.at_end = not piece
        self.text = self.text[self.at :] + self._decode(piece, not piece)
        self.at = self._counted_to = 0

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

    def _count_bytes(self) -> None:
        uncounted = self.text[self._counted_to : self.at]
        self._byte += len(uncounted.encode("utf-8", "surrogateescape"))
        self._counted_to = self.at

    def characters(self) -> int:
        """Return the number of characters before the position."""
        return self._characters_before + self.at

    def byte(self) -> int:
        """Return the position as a byte of the file."""
        self._count_bytes()
        return self._byte


def read_json(
    path: Path, name: str, start: FilePosition, columns: Sequence[str] | None
) -> Iterator[Block]:
    """Read an array of objects, or objects that follow each other."""
    text, line = _Cursor(path, name, 0), start.line
    in_array = text.skip_space() == "["
    if start.offset:
        text = _Cursor(path, name, start.offset)
    elif in_array:
        text.at += 1
    first = start.line == 0
    decode = json.JSONDecoder(strict=False).raw_decode
    rows: list[Row] = []
    block_start = text.characters()
    while True:
        comma = _COMMA.match(text.text, text.at) if in_array and not first else None
        if comma and comma.end() < len(text.text):
            text.at = comma.end()
        elif not _next_row(text, name, line, in_array=in_array, first=first):
            break
        first = False
        as_columns = columns if in_array and not rows else None
        if as_columns and (block := _array_columns(text, as_columns, line, name)):
            line = block.end.line
            block_start = text.characters()
            yield block
            continue
        while True:
            try:
                value, text.at = decode(text.text, text.at)
                break
            except ValueError as error:
                if text.at_end or not _may_be_incomplete(error, text.text):
                    reason = getattr(error, "msg", str(error))
                    raise UsageError(f"{name}: row {line}: not valid JSON: {reason}") from None
                if len(text.text) - text.at > MAX_ROW_BYTES:
                    raise UsageError(f"{name}: row {line} is longer than 128 MB") from None
                text.more()
            except RecursionError:
                raise UsageError(f"{name}: row {line}: not valid JSON: nested too deep") from None
        rows.append(_as_row(value, f"{name}: row {line}"))
        line += 1
        if len(rows) == MAX_ROWS or text.characters() - block_start >= MAX_BYTES:
            block_start = text.characters()
            yield RowBlock(rows, FilePosition(text.byte(), line))
            rows = []
    if not line and not in_array:
        raise UsageError(f"{name}: not valid JSON: the file is empty")
    end = FilePosition(text.byte(), line)
    if in_array:
        text.at += 1
        if text.skip_space():
            raise UsageError(f"{name}: not valid JSON: text after the end of the array")
    if rows:
        yield RowBlock(rows, end)


def _next_row(text: _Cursor, name: str, line: int, *, in_array: bool, first: bool) -> bool:
    """Move to the next object; return False if there is none."""
    character = text.skip_space()
    if in_array and character and not first:
        if character not in ",]":
            raise UsageError(f"{name}: not valid JSON: expected ',' after row {line - 1}")
        if character == ",":
            text.at += 1
            character = text.skip_space()
            if character == "]":
                raise UsageError(f"{name}: not valid JSON: nothing after the last ','")
    elif in_array and character == ",":
        raise UsageError(f"{name}: not valid JSON: ',' before the first row")
    if in_array and not character:
        raise UsageError(f"{name}: not valid JSON: the array has no end")
    return character != "" and not (in_array and character == "]")


def _may_be_incomplete(error: ValueError, text: str) -> bool:
    """Return whether the error may only be that the row is not read to its end."""
    message, position = getattr(error, "msg", ""), getattr(error, "pos", len(text))
    return message.startswith("Unterminated string") or position > len(text) - 16


def _array_columns(text: _Cursor, columns: Sequence[str], line: int, name: str) -> Block | None:
    """Return the next rows of an array as columns; None if they must be read one by one.

    Rows are split at a brace, a comma and a brace. Where these are inside a row, the parts are
    not valid JSON, because no JSON string may hold the line breaks that replace them.
    """
    text.fill()
    piece = text.text[text.at : text.at + MAX_BYTES]
    *rows, rest = _ROW_BOUNDARY.split(piece, maxsplit=MAX_ROWS)
    if not rows:
        return None
    lines = f"}}{_SEPARATOR}".join(rows).encode("utf-8", "surrogateescape") + b"}"
    batch = text_columns(lines.translate(_TO_LINES), len(rows), columns)
    if batch is None:
        return None
    text.at += piece.rindex("}", 0, len(piece) - len(rest)) + 1
    end = FilePosition(text.byte(), line + len(rows))

    def read() -> list[Row]:
        return _objects("},".join(rows) + "}", f"{name}: row ", line)

    return LazyBlock(batch, end, read)


def _objects(text: str, where: str, line: int) -> list[Row]:
    """Parse objects separated by commas or line breaks."""
    decode, separator = json.JSONDecoder(strict=False).raw_decode, re.compile(r"[ \t\r\n,]*")
    rows: list[Row] = []
    at = 0
    while at < len(text):
        try:
            value, at = decode(text, at)
        except RecursionError:
            raise UsageError(
                f"{where}{line + len(rows)}: not valid JSON: nested too deep"
            ) from None
        rows.append(value)
        match = separator.match(text, at)
        assert match is not None
        at = match.end()
    return rows


def read_json_lines(
    path: Path, name: str, start: FilePosition, columns: Sequence[str] | None
) -> Iterator[Block]:
    """Read one object per line; blank lines are skipped."""
    file = open_text(path, name, start.offset)
    offset, line = start
    unread, at_end = b"", False
    while True:
        while not at_end and (len(unread) <= MAX_BYTES or b"\n" not in unread):
            if len(unread) > MAX_ROW_BYTES:
                raise UsageError(f"{name}:{line + 1}: the line is longer than 128 MB")
            piece = bytes(file.read(MAX_BYTES))
            at_end = not piece
            unread += piece
        if not unread:
            return
        size = _block_size(unread)
        lines, unread = unread[:size], unread[size:]
        end = FilePosition(offset + size, line + lines.count(b"\n") + (not lines.endswith(b"\n")))
        if not line:
            lines = lines.removeprefix(_BOM)
        yield from _line_blocks(lines, name, FilePosition(offset, line), end, columns)
        offset, line = end


def _block_size(text: bytes) -> int:
    """Return the bytes of the lines that make a block."""
    if len(text) <= MAX_BYTES and text.count(b"\n") <= MAX_ROWS:
        return len(text)
    size = text.rfind(b"\n", 0, MAX_BYTES) + 1 or text.find(b"\n") + 1 or len(text)
    first = text[:size].split(b"\n", MAX_ROWS)
    return size - len(first[-1]) if len(first) > MAX_ROWS else size


def _line_blocks(
    text: bytes, name: str, begin: FilePosition, end: FilePosition, columns: Sequence[str] | None
) -> Iterator[Block]:
    lines = text.split(b"\n")
    count = sum(1 for line in lines if line and not line.isspace())
    if not count:
        return
    if columns and (batch := text_columns(text, count, columns)) is not None:

        def read() -> list[Row]:
            return _objects(
                text.decode("utf-8", "surrogateescape").strip(), f"{name}:", begin.line + 1
            )

        yield LazyBlock(batch, end, read)
        return
    rows: list[Row] = []
    offset = begin.offset
    for number, raw in enumerate(lines, begin.line + 1):
        line = raw.decode("utf-8", "surrogateescape")
        if line and not line.isspace():
            where = f"{name}:{number}"
            try:
                rows.append(_as_row(_parse(line, where), where))
            except UsageError:
                if rows:  # a caller that stops after these never sees the error
                    yield RowBlock(rows, FilePosition(offset, number - 1))
                raise
        offset += len(raw) + 1
    if rows:
        yield RowBlock(rows, end)


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None


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
