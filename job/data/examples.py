"""Convert rows to examples, or give the reason a row is dropped.

This module defines what one row means, for values of any type; `columnar` does the same for
columns of plain text, vectorized.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from job.chat.conversation import Message, Role
from job.data.row_blocks import Row
from job.spec.fields import template_fields
from job.spec.schema import Data

SEPARATOR = "\x1f"
"""Joins the texts of an example: the ASCII unit separator."""

_LOWER = bytes(range(256)).lower()
_IGNORED_ASCII = bytes(b for b in range(128) if not chr(b).isalnum() and b != ord(SEPARATOR))
_IGNORED = re.compile(rf"[^\w{SEPARATOR}]|_")
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
}


@dataclass(frozen=True)
class Example:
    """A conversation to learn from; its last message is the response."""

    id: str
    """A hash of the content: equal text has the same id in any file, in any order."""
    messages: tuple[Message, ...]

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0]
        return first.content if first.role == "system" else None

    @property
    def prompt(self) -> str:
        """The last message of the user."""
        return self.messages[-2].content

    @property
    def response(self) -> str:
        """The last message of the assistant."""
        return self.messages[-1].content

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages that a model responds to."""
        return self.messages[:-1]

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system message."""
        return self.messages if self.system is None else self.messages[1:]


class RowDroppedError(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def turns_text(turns: Iterable[str]) -> str:
    """Return the texts of the user and the assistant in turn as one text."""
    return SEPARATOR.join(turns)


def opening(system: str | None) -> bytes:
    """Return what precedes the turns in the content of an example, which is hashed."""
    return f"{system or ''}{SEPARATOR}".encode()


exact_hash = xxhash.xxh3_64_digest
"""Eight bytes that identify a content: XXH3, which is fast but not cryptographic."""


def normal_form(text: bytes) -> bytes:
    """Return only the letters and digits, in lower case; near-duplicates have equal ones."""
    if text.isascii():
        return text.translate(_LOWER, _IGNORED_ASCII)
    folded = unicodedata.normalize("NFKC", text.decode()).casefold()
    return _IGNORED.sub("", folded).encode()


def field_text(row: Row, field: str) -> str:
    """Return the text of a field.

    Raises:
        RowDroppedError: it is missing, or neither text nor a number.
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
    """Return a template with the row's fields filled in, unchanged.

    Raises:
        RowDroppedError: a field it names is missing or is not text.
    """
    values: dict[str, Any] = {field: field_text(row, field) for field in template_fields(template)}
    return template.format(**values)


class ExampleMapper:
    """Makes examples from rows as the `data` section says."""

    def __init__(self, data: Data) -> None:
        self.data = data

    @cached_property
    def fields(self) -> list[str]:
        """The columns that are read, each once."""
        templates = [self.data.prompt, self.data.response, self.data.system]
        named = [field for text in templates if text for field in template_fields(text)]
        return list(dict.fromkeys([*named, *([self.data.messages] if self.data.messages else [])]))

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            RowDroppedError: the row cannot be used.
        """
        system = fill(self.data.system, row).strip() if self.data.system else None
        if self.data.messages:
            own_system, turns = _conversation(row, self.data.messages)
            system = own_system or system
        else:
            turns = [
                Message("user", self._filled("prompt", self.data.prompt, row)),
                Message("assistant", self._filled("response", self.data.response, row)),
            ]
        text = turns_text(message.content for message in turns)
        before = [] if system is None else [Message("system", system)]
        return Example(exact_hash(opening(system) + text.encode()).hex(), (*before, *turns))

    @staticmethod
    def _filled(name: str, template: str | None, row: Row) -> str:
        assert template is not None
        if not any(field_text(row, field).strip() for field in template_fields(template)):
            raise RowDroppedError(f"empty {name}")
        return fill(template, row).strip()


def _conversation(row: Row, column: str) -> tuple[str | None, list[Message]]:
    """Return the system text and the turns of a row's messages.

    Messages have `role` and `content`, or `from` and `value`. Consecutive messages of one side
    are joined. Messages of the assistant before the first of the user, and messages of the user
    after the last of the assistant, are left out.
    """
    if column not in row:
        raise RowDroppedError(f"no column '{column}'")
    values = row[column]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise RowDroppedError(f"no list of messages in '{column}'")
    system: str | None = None
    turns: list[Message] = []
    for value in values:
        name = str(value.get("role") or value.get("from") or "").lower()
        text = _message_text(value, column)
        if name == "system":
            if turns or system is not None:
                raise RowDroppedError(f"system message inside the dialogue in '{column}'")
            system = text or None
            continue
        role = _ROLES.get(name)
        if role is None:
            raise RowDroppedError(f"unknown role '{name[:20]}' in '{column}'")
        if not text:
            raise RowDroppedError("empty prompt" if role == "user" else "empty response")
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{text}")
        elif turns or role == "user":
            turns.append(Message(role, text))
    if turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise RowDroppedError(f"no answer in '{column}'")
    return system, turns


def _message_text(message: Row, column: str) -> str:
    value = message.get("content", message.get("value"))
    if isinstance(value, list):  # parts of a message; only text can be used
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise RowDroppedError(f"not text in '{column}'")
        value = "\n".join(_text(part.get("text"), column) for part in value)
    return _text(value, column).strip()
