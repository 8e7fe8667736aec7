"""Readers of text: CSV, a JSON object a line, and JSON objects in one array.

An array that fills a whole file is read as it comes and never held. The files may be
compressed. Bytes that are no UTF-8 become lone surrogates, so that the row they are in can be
dropped and counted instead of the whole file being refused.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from job.data.blocks import MAX_BYTES, MAX_ROWS, Block, Place, Row, RowBlock
from job.errors import UsageError

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Arrow's name of the compression of each ending."""

_LONGEST_ROW = 128 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)")


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a row must be an object with named fields, not {value!r:.60}")
    return value


def _open(path: Path, name: str, offset: int) -> Any:
    """The bytes of a file, decompressed, from a place on."""
    import pyarrow as pa

    if Path(name.lower()).suffix not in CODECS:
        file = path.open("rb")
        file.seek(offset)
        return file
    codec = CODECS[Path(name.lower()).suffix]
    stream = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    while offset > 0:
        skipped = len(stream.read(min(offset, MAX_BYTES)))
        if not skipped:
            break
        offset -= skipped
    return stream


class _Text:
    """The text of a file from a place on, with the byte it is at."""

    def __init__(self, path: Path, name: str, offset: int) -> None:
        self._file = _open(path, name, offset)
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
        self._next = MAX_BYTES if self.at else min(2 * self._next, _LONGEST_ROW)
        piece = bytes(self._file.read(self._next))
        if self._first and piece.startswith(_BOM):
            self._bytes += len(_BOM)
            piece = piece[len(_BOM) :]
        self._first = False
        self.ended = not piece
        self.text = self.text[self.at :] + self._decode(piece, not piece)
        self.at = self._counted = 0

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


def read_json(path: Path, name: str, start: Place, _: Sequence[str] | None) -> Iterator[Block]:
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
        while True:
            try:
                value, text.at = decode(text.text, text.at)
                break
            except ValueError as error:
                if text.ended or not _may_be_cut(error, text.text):
                    reason = getattr(error, "msg", str(error))
                    raise UsageError(f"{name}: row {line}: not valid JSON: {reason}") from None
                if len(text.text) - text.at > _LONGEST_ROW:
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


def read_json_lines(
    path: Path, name: str, start: Place, _: Sequence[str] | None
) -> Iterator[Block]:
    """An object a line; blank lines are no rows."""
    file = _open(path, name, start.offset)
    offset, line = start
    rows: list[Row] = []
    rest, since = b"", offset
    while True:
        piece = bytes(file.read(MAX_BYTES))
        whole, cut, rest = (rest + piece).rpartition(b"\n") if piece else (rest, b"", b"")
        if piece and not cut:
            if len(rest) > _LONGEST_ROW:
                raise UsageError(f"{name}:{line + 1}: the line is longer than 128 MB")
            continue
        for raw in whole.split(b"\n"):
            line += 1
            offset += len(raw) + 1
            text = raw.decode("utf-8", "surrogateescape")
            if line == 1:
                text = text.removeprefix("\ufeff")
            if not text or text.isspace():
                continue
            try:
                rows.append(_as_row(_parsed(text, f"{name}:{line}"), f"{name}:{line}"))
            except UsageError:
                if rows:  # whoever wants no more than these need not know
                    yield RowBlock(rows, Place(offset - len(raw) - 1, line - 1))
                raise
            if len(rows) == MAX_ROWS or offset - since >= MAX_BYTES:
                since = offset
                yield RowBlock(rows, Place(offset, line))
                rows = []
        if not piece:
            break
    if rows:
        yield RowBlock(rows, Place(offset, line))


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None


def read_csv(path: Path, name: str, start: Place, _: Sequence[str] | None) -> Iterator[Block]:
    """Rows under a header; a row that ends early has nulls."""
    csv.field_size_limit(_LONGEST_ROW)
    passed = 0

    def lines(file: Any) -> Iterator[str]:
        nonlocal passed
        rest = b""
        while piece := bytes(file.read(MAX_BYTES)):
            *whole, rest = (rest + piece).split(b"\n")
            for raw in whole:
                passed += len(raw) + 1
                yield raw.decode("utf-8", "surrogateescape") + "\n"
        if rest:
            passed += len(rest)
            yield rest.decode("utf-8", "surrogateescape")

    try:
        reader = csv.reader(lines(_open(path, name, 0)), strict=True)
        header = next(reader, [])
        if header:
            header[0] = header[0].removeprefix("\ufeff")
        if start.offset:
            passed = start.offset
            reader = csv.reader(lines(_open(path, name, start.offset)), strict=True)
        before = start.line if start.offset else 0
        rows: list[Row] = []
        since = passed
        for fields in reader:
            if not fields:
                continue
            if len(fields) > len(header):
                raise UsageError(
                    f"{name}:{before + reader.line_num}: more fields than the header names; "
                    "quote fields that hold commas"
                )
            row: Row = dict(zip(header, fields, strict=False))
            row.update(dict.fromkeys(header[len(fields) :]))
            rows.append(row)
            if len(rows) == MAX_ROWS or passed - since >= MAX_BYTES:
                since = passed
                yield RowBlock(rows, Place(passed, before + reader.line_num))
                rows = []
        if rows:
            yield RowBlock(rows, Place(passed, before + reader.line_num))
    except csv.Error as error:
        raise UsageError(f"{name}: not a readable CSV file: {error}") from None
