"""From a row to an example: templates filled in or a dialogue taken apart, faults named.

This is the meaning of a row, one at a time and for any type of value; `mapping` does the same
to whole columns where all is plain text.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import xxhash

from job.data.blocks import Row
from job.spec.fields import template_fields
from job.spec.schema import Data

SEPARATOR = "\x1f"
"""Between the texts of an example where they are one: the ASCII unit separator."""


_LOWER = bytes(range(256)).lower()


_NOT_COUNTED = bytes(b for b in range(128) if not chr(b).isalnum() and b != ord(SEPARATOR))


_NOT_COUNTED_WIDE = re.compile(rf"[^\w{SEPARATOR}]|_")


_USERS = ("user", "human", "prompter")


_MODELS = ("assistant", "gpt", "model", "chatgpt", "bot")


_SYSTEMS = ("system",)


class Turn(NamedTuple):
    """What the user said, and what the model answered."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Example:
    """A dialogue: what the user says and what the model should answer."""

    id: str
    """A hash of the content: the same text has the same id in any file, in any order."""
    system: str | None
    prompt: str
    """The user's last turn."""
    response: str
    """The model's last turn."""
    history: tuple[Turn, ...] = ()
    """The turns before."""


class RowDroppedError(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def dialogue(history: Iterable[Turn], prompt: str, response: str) -> str:
    """The turns of an example as one text."""
    return SEPARATOR.join([*(text for turn in history for text in turn), prompt, response])


def opening(system: str | None) -> bytes:
    """What stands before the dialogue in the content of an example, which is hashed."""
    return f"{system or ''}{SEPARATOR}".encode()


exact_hash = xxhash.xxh3_64_digest
"""Eight bytes that stand for a content: XXH3, which is fast and no protection against forgery."""


def normal_form(text: bytes) -> bytes:
    """Its letters and digits: case, spacing and signs do not count."""
    if text.isascii():
        return text.translate(_LOWER, _NOT_COUNTED)
    folded = unicodedata.normalize("NFKC", text.decode()).casefold()
    return _NOT_COUNTED_WIDE.sub("", folded).encode()


def field_text(row: Row, field: str) -> str:
    """The text of a field.

    Raises:
        Dropped: it is missing, or is no text or number.
    """
    if field not in row:
        raise RowDroppedError(f"no column '{field}'")
    return _text(row[field], field)


def _text(value: object, field: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowDroppedError(f"null in '{field}'")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowDroppedError(f"not text in '{field}'")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowDroppedError(f"undecodable text in '{field}'") from None
    return text


def fill(template: str, row: Row) -> str:
    """A template with the row's fields in it, as they are.

    Raises:
        Dropped: a field it names is missing or is no text.
    """
    values: dict[str, Any] = {field: field_text(row, field) for field in template_fields(template)}
    return template.format(**values)


class ExampleMapper:
    """Makes examples as the `data` section says."""

    def __init__(self, data: Data) -> None:
        self.data = data

    @cached_property
    def fields(self) -> list[str]:
        """The columns that are needed, each once."""
        templates = [self.data.prompt, self.data.response, self.data.system]
        named = [field for text in templates if text for field in template_fields(text)]
        return list(dict.fromkeys([*named, *([self.data.messages] if self.data.messages else [])]))

    def __call__(self, row: Row) -> Example:
        """The example of a row.

        Raises:
            Dropped: the row cannot be used.
        """
        system = fill(self.data.system, row).strip() if self.data.system else None
        if self.data.messages:
            said, turns = _turns(row, self.data.messages)
            system = said or system
            *history, (prompt, response) = turns
            return self._made(system, tuple(history), prompt, response)
        texts = []
        for name, template in (("prompt", self.data.prompt), ("response", self.data.response)):
            assert template is not None
            if not any(field_text(row, field).strip() for field in template_fields(template)):
                raise RowDroppedError(f"empty {name}")
            texts.append(fill(template, row).strip())
        return self._made(system, (), *texts)

    def _made(
        self, system: str | None, history: tuple[Turn, ...], prompt: str, response: str
    ) -> Example:
        said = dialogue(history, prompt, response)
        identity = exact_hash(opening(system) + said.encode()).hex()
        return Example(identity, system, prompt, response, history)


def _turns(row: Row, column: str) -> tuple[str | None, list[Turn]]:
    """The system text and the turns of a dialogue: `role` and `content`, or `from` and `value`.

    Messages of one side that follow each other are one turn. What the model says before the
    user does, and what the user says last without an answer, is left out.
    """
    if column not in row:
        raise RowDroppedError(f"no column '{column}'")
    messages = row[column]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RowDroppedError(f"no list of messages in '{column}'")
    system: str | None = None
    sides: list[tuple[str, str]] = []
    for message in messages:
        role = str(message.get("role") or message.get("from") or "").lower()
        text = _message_text(message, column)
        if role in _SYSTEMS:
            if sides or system is not None:
                raise RowDroppedError(f"system message inside the dialogue in '{column}'")
            system = text or None
            continue
        side = "user" if role in _USERS else "model" if role in _MODELS else ""
        if not side:
            raise RowDroppedError(f"unknown role '{role[:20]}' in '{column}'")
        if not text:
            raise RowDroppedError("empty prompt" if side == "user" else "empty response")
        if sides and sides[-1][0] == side:
            sides[-1] = (side, f"{sides[-1][1]}\n\n{text}")
        elif sides or side == "user":
            sides.append((side, text))
    texts = [text for _, text in sides]
    turns = [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=False)]
    if not turns:
        raise RowDroppedError(f"no answer in '{column}'")
    return system, turns


def _message_text(message: Row, column: str) -> str:
    value = message.get("content", message.get("value"))
    if isinstance(value, list):  # parts, of which only text can be used
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise RowDroppedError(f"not text in '{column}'")
        value = "\n".join(_text(part.get("text"), column) for part in value)
    return _text(value, column).strip()
