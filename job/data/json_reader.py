"""Readers of JSON: an object a line, and objects in one array.

An array that fills a whole file is read as it comes and never held. Where columns are asked for,
Arrow's parser gives them without a Python object for each value; what it does not take is read
row by row, with the same result.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.blocks import (
    LONGEST_ROW,
    MAX_BYTES,
    MAX_ROWS,
    ArrowBlock,
    Block,
    Place,
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


_BETWEEN = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")


_MARK = "\x1e"


_ON_LINES = bytes.maketrans(b"\r\n\x1e", b"\t\t\n")
"""White space that ends no line, and the end of a line where `_MARK` is."""


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object with named fields, not {value!r:.60}")
    return value


class _Text:
    """The text of a file from a place on, with the byte it is at."""

    def __init__(self, path: Path, name: str, offset: int) -> None:
        self._file = open_text(path, name, offset)
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text = ""
        self.at = 0
        self.ended = False
        self._passed = 0
        self._counted = 0
        self._bytes = offset
        self._next = MAX_BYTES
        self._first = offset == 0

    def more(self) -> None:
        """Drop what was read and add the next piece; pieces grow while one row needs several."""
        self._count()
        self._passed += self.at
        self._next = MAX_BYTES if self.at else min(2 * self._next, LONGEST_ROW)
        piece = bytes(self._file.read(self._next))
        if self._first and piece.startswith(_BOM):
            self._bytes += len(_BOM)
            piece = piece[len(_BOM) :]
        self._first = False
        self.ended = not piece
        self.text = self.text[self.at :] + self._decode(piece, not piece)
        self.at = self._counted = 0

    def fill(self) -> None:
        """Have as much text ahead as is read at once, or all that is left."""
        while not self.ended and len(self.text) - self.at < MAX_BYTES:
            self.more()

    def skip_space(self) -> str:
        """Pass white space; the character that follows, or nothing at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def _count(self) -> None:
        passed = self.text[self._counted : self.at]
        self._bytes += len(passed.encode("utf-8", "surrogateescape"))
        self._counted = self.at

    def passed(self) -> int:
        """Characters read since the beginning."""
        return self._passed + self.at

    def byte(self) -> int:
        """The byte in the file that `at` stands for."""
        self._count()
        return self._bytes


def read_json(
    path: Path, name: str, start: Place, columns: Sequence[str] | None
) -> Iterator[Block]:
    """One array of objects, or objects one after the other."""
    text, line = _Text(path, name, 0), start.line
    in_array = text.skip_space() == "["
    if start.offset:
        text = _Text(path, name, start.offset)
    elif in_array:
        text.at += 1
    first = start.line == 0
    decode = json.JSONDecoder(strict=False).raw_decode
    rows: list[Row] = []
    since = text.passed()
    while True:
        between = _COMMA.match(text.text, text.at) if in_array and not first else None
        if between and between.end() < len(text.text):
            text.at = between.end()
        elif not _next_row(text, name, line, in_array=in_array, first=first):
            break
        first = False
        if columns and in_array and not rows and (block := _ahead(text, columns, line, name)):
            line = block.end.line
            since = text.passed()
            yield block
            continue
        while True:
            try:
                value, text.at = decode(text.text, text.at)
                break
            except ValueError as error:
                if text.ended or not _may_be_cut(error, text.text):
                    reason = getattr(error, "msg", str(error))
                    raise UsageError(f"{name}: row {line}: not valid JSON: {reason}") from None
                if len(text.text) - text.at > LONGEST_ROW:
                    raise UsageError(f"{name}: row {line} is longer than 128 MB") from None
                text.more()
            except RecursionError:
                raise UsageError(f"{name}: row {line}: not valid JSON: nested too deep") from None
        rows.append(_as_row(value, f"{name}: row {line}"))
        line += 1
        if len(rows) == MAX_ROWS or text.passed() - since >= MAX_BYTES:
            since = text.passed()
            yield RowBlock(rows, Place(text.byte(), line))
            rows = []
    if not line and not in_array:
        raise UsageError(f"{name}: not valid JSON: the file is empty")
    end = Place(text.byte(), line)
    if in_array:
        text.at += 1
        if text.skip_space():
            raise UsageError(f"{name}: not valid JSON: there is more behind the end of the array")
    if rows:
        yield RowBlock(rows, end)


def _next_row(text: _Text, name: str, line: int, *, in_array: bool, first: bool) -> bool:
    """Go to the next object; False where there is none."""
    found = text.skip_space()
    if in_array and found and not first:
        if found not in ",]":
            raise UsageError(f"{name}: not valid JSON: expected ',' behind row {line - 1}")
        if found == ",":
            text.at += 1
            found = text.skip_space()
            if found == "]":
                raise UsageError(f"{name}: not valid JSON: nothing behind the last ','")
    elif in_array and found == ",":
        raise UsageError(f"{name}: not valid JSON: ',' before the first row")
    if in_array and not found:
        raise UsageError(f"{name}: not valid JSON: the array has no end")
    return found != "" and not (in_array and found == "]")


def _may_be_cut(error: ValueError, text: str) -> bool:
    """Whether the end of what was read so far may be what is wrong."""
    message, place = getattr(error, "msg", ""), getattr(error, "pos", len(text))
    return message.startswith("Unterminated string") or place > len(text) - 16


def _ahead(text: _Text, columns: Sequence[str], line: int, name: str) -> Block | None:
    """The whole rows that come next in an array; None where they are to be read one by one.

    Rows end where a brace, a comma and a brace follow each other. Where these are part of a row,
    what is cut there is no JSON, because no text may hold the ends of lines that take their place.
    """
    text.fill()
    piece = text.text[text.at : text.at + MAX_BYTES]
    *whole, rest = _BETWEEN.split(piece, maxsplit=MAX_ROWS)
    if not whole:
        return None
    found = f"}}{_MARK}".join(whole).encode("utf-8", "surrogateescape") + b"}"
    batch = text_columns(found.translate(_ON_LINES), len(whole), columns)
    if batch is None:
        return None
    text.at += piece.rindex("}", 0, len(piece) - len(rest)) + 1
    end = Place(text.byte(), line + len(whole))

    def read() -> list[Row]:
        return _objects("},".join(whole) + "}", f"{name}: row ", line)

    return LazyBlock(batch, end, read)


def _objects(text: str, where: str, line: int) -> list[Row]:
    """Objects with commas or ends of lines between them."""
    decode, between = json.JSONDecoder(strict=False).raw_decode, re.compile(r"[ \t\r\n,]*")
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
        found = between.match(text, at)
        assert found is not None
        at = found.end()
    return rows


def read_json_lines(
    path: Path, name: str, start: Place, columns: Sequence[str] | None
) -> Iterator[Block]:
    """An object a line; blank lines are no rows."""
    file = open_text(path, name, start.offset)
    offset, line = start
    ahead, ended = b"", False
    while True:
        while not ended and (len(ahead) <= MAX_BYTES or b"\n" not in ahead):
            if len(ahead) > LONGEST_ROW:
                raise UsageError(f"{name}:{line + 1}: the line is longer than 128 MB")
            piece = bytes(file.read(MAX_BYTES))
            ended = not piece
            ahead += piece
        if not ahead:
            return
        size = _whole_lines(ahead)
        lines, ahead = ahead[:size], ahead[size:]
        end = Place(offset + size, line + lines.count(b"\n") + (not lines.endswith(b"\n")))
        if not line:
            lines = lines.removeprefix(_BOM)
        yield from _of_lines(lines, name, Place(offset, line), end, columns)
        offset, line = end


def _whole_lines(text: bytes) -> int:
    """The length of the lines that make a block."""
    if len(text) <= MAX_BYTES and text.count(b"\n") <= MAX_ROWS:
        return len(text)
    size = text.rfind(b"\n", 0, MAX_BYTES) + 1 or text.find(b"\n") + 1 or len(text)
    first = text[:size].split(b"\n", MAX_ROWS)
    return size - len(first[-1]) if len(first) > MAX_ROWS else size


def _of_lines(
    text: bytes, name: str, begin: Place, end: Place, columns: Sequence[str] | None
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
        said = raw.decode("utf-8", "surrogateescape")
        if said and not said.isspace():
            where = f"{name}:{number}"
            try:
                rows.append(_as_row(_parsed(said, where), where))
            except UsageError:
                if rows:  # whoever wants no more than these need not know
                    yield RowBlock(rows, Place(offset, number - 1))
                raise
        offset += len(raw) + 1
    if rows:
        yield RowBlock(rows, end)


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None


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
