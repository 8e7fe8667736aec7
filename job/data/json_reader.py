"""A reader of JSON: an array of objects, or objects that follow each other, such as one per line.

The text is streamed, never held in memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from job.data.row_blocks import MAX_BYTES, MAX_ROW_BYTES, Row, open_bytes, unicode_encoding
from job.errors import UsageError

_SPACE = re.compile(r"[ \t\r\n]*")
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


def read_json(path: Path, name: str) -> Iterator[tuple[Row, int]]:
    """Yield the objects of an array, or objects that follow each other, with their lengths."""
    text = _Text(path, name)
    if text.skip_space() == "[":
        yield from _array(text)
    while text.skip_space():
        yield _row(text)


def _array(text: _Text) -> Iterator[tuple[Row, int]]:
    """Yield the objects of the array that begins here."""
    text.at += 1
    character = text.skip_space()
    while character not in ("", "]"):
        yield _row(text)
        if (character := text.skip_space()) == ",":
            text.at += 1
            if (character := text.skip_space()) == "]":
                raise UsageError(f"{text.place}: not valid JSON: nothing after the last ','")
        elif character not in ("", "]"):
            raise UsageError(f"{text.place}: not valid JSON: expected ',' before the row")
    if not character:
        raise UsageError(f"{text.place}: not valid JSON: the array has no end")
    text.at += 1
    if text.skip_space():
        raise UsageError(f"{text.place}: not valid JSON: text after the end of the array")


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
