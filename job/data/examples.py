"""Convert rows to examples, or give the reason a row is dropped.

This module defines what one row means, for values of any type; `columnar` does the same for
columns of plain text, vectorized.
"""

import json
import math
import unicodedata
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

import regex
import xxhash

from job.chat.conversation import Message, Role
from job.data.row_blocks import Row
from job.spec.data import Data, ExampleSource
from job.spec.fields import fill_template, template_fields

SEPARATOR = "\x1f"
"""Joins the texts of an example: the ASCII unit separator."""

SIDES: tuple[Role, Role] = ("user", "assistant")
_LOWER = bytes(range(256)).lower()
_IGNORED_ASCII = bytes(b for b in range(128) if not chr(b).isalnum() and b != ord(SEPARATOR))
_IGNORED = regex.compile(rf"[^\p{{L}}\p{{M}}\p{{N}}{SEPARATOR}]+")
_CALL = "function_call"
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", _CALL), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
_TOOLS = ("tools", "functions")
"""Columns of tools beside the column of messages, if they exist."""


@dataclass(frozen=True)
class Example:
    """A conversation to learn from; its last message is the response."""

    id: str
    """A hash of the content: equal text has the same id in any file, in any order."""
    messages: tuple[Message, ...]

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((m.content for m in self.messages if m.role == "system"), None)

    @property
    def prompt(self) -> str:
        """The last message of the user."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def response(self) -> str:
        """The last message of the assistant, with its tool calls as JSON."""
        last = self.messages[-1]
        calls = json.loads(last.extra or "{}").get("tool_calls", ())
        functions = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
        return "\n".join(filter(None, (last.content, *functions)))

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages that a model responds to."""
        return self.messages[:-1]

    @cached_property
    def turns(self) -> list[Message]:
        """The messages without the system message."""
        return [message for message in self.messages if message.role != "system"]

    @cached_property
    def is_plain(self) -> bool:
        """Whether the turns are only texts of the user and the assistant, all to learn from."""
        kinds = [(message.role, message.weight, message.extra) for message in self.turns]
        return kinds == [(side, 1, "") for side in SIDES] * (len(kinds) // 2)

    @property
    def text(self) -> str:
        """What is hashed, checked, and searched of the turns."""
        if self.is_plain:
            return SEPARATOR.join(message.content for message in self.turns)
        return SEPARATOR.join(str(value) for m in self.turns for value in astuple(m))


class RowDroppedError(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def opening(system: str | None) -> bytes:
    """Return what precedes the turns in the content of an example, which is hashed."""
    return f"{system or ''}{SEPARATOR}".encode()


exact_hash = xxhash.xxh3_64_digest
"""Eight bytes that identify a content: XXH3, which is fast but not cryptographic."""


def normal_form(text: bytes) -> bytes:
    """Return the letters, with marks, and digits in lower case; near-duplicates have equal ones."""
    if text.isascii():
        return text.translate(_LOWER, _IGNORED_ASCII)
    folded = unicodedata.normalize("NFKC", text.decode()).casefold()
    normal: str = _IGNORED.sub("", folded)
    return normal.encode()


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
    return fill_template(template, [field_text(row, field) for field in template_fields(template)])


class ExampleMapper:
    """Makes examples from rows as a section of the spec says."""

    def __init__(self, data: ExampleSource) -> None:
        self.data = data
        self.group_column = data.group if isinstance(data, Data) else None

    @cached_property
    def fields(self) -> list[str]:
        """The columns that are read, each once; those of tools need not exist."""
        templates = [self.data.prompt, self.data.response, self.data.system]
        named = [field for text in templates if text for field in template_fields(text)]
        messages = [self.data.messages, *_TOOLS] if self.data.messages else []
        group = [self.group_column] if self.group_column else []
        return list(dict.fromkeys([*named, *messages, *group]))

    def group(self, row: Row) -> str | None:
        """Return the text of the column `data.group`; None if the spec names none.

        Raises:
            RowDroppedError: the row has none.
        """
        return field_text(row, self.group_column) if self.group_column else None

    def __call__(self, row: Row) -> Example:
        """Return the example of a row.

        Raises:
            RowDroppedError: the row cannot be used.
        """
        system = fill(self.data.system, row).strip() if self.data.system else None
        tools: list[Row] = []
        if self.data.messages:
            own_system, turns = _conversation(row, self.data.messages)
            system = own_system or system
            tools = [tool for name in _TOOLS for tool in _functions(row.get(name), name)]
        else:
            turns = [
                Message("user", self._filled("prompt", self.data.prompt, row)),
                Message("assistant", self._filled("response", self.data.response, row)),
            ]
        before = [Message("tools", _to_json(tools, "tools"))] if tools else []
        before += [] if system is None else [Message("system", system)]
        example = Example("", (*before, *turns))
        return replace(example, id=exact_hash(opening(system) + example.text.encode()).hex())

    @staticmethod
    def _filled(name: str, template: str | None, row: Row) -> str:
        assert template is not None
        if not any(field_text(row, field).strip() for field in template_fields(template)):
            raise RowDroppedError(f"empty {name}")
        return fill(template, row).strip()


def _conversation(row: Row, column: str) -> tuple[str | None, list[Message]]:
    """Return the system text and the turns of a row's messages.

    Messages have `role` and `content`, or `from` and `value`. Consecutive messages of one side
    are joined. What comes before the user's first, or after the last to learn from, is left out.
    """
    if column not in row:
        raise RowDroppedError(f"no column '{column}'")
    values = row[column]
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise RowDroppedError(f"no list of messages in '{column}'")
    system: list[str] = []
    turns: list[Message] = []
    for value in values:
        message = _message(value, column)
        if message.role == "system":
            if turns:
                raise RowDroppedError(f"system message inside the dialogue in '{column}'")
            system.append(message.content)
        elif turns and _can_join(turns[-1], message):
            turns[-1] = replace(message, content=f"{turns[-1].content}\n\n{message.content}")
        elif turns or message.role == "user":
            turns.append(message)
    ends = [n for n, m in enumerate(turns, 1) if m.role == "assistant" and m.weight]
    if not ends:
        answered = any(message.role == "assistant" for message in turns)
        raise RowDroppedError("no message to train on" if answered else f"no answer in '{column}'")
    return "\n\n".join(filter(None, system)) or None, turns[: ends[-1]]


def _can_join(first: Message, second: Message) -> bool:
    same = first.role == second.role != "tool" and first.weight == second.weight
    return same and not (first.extra or second.extra)


def _message(value: Row, column: str) -> Message:
    name = str(value.get("role") or value.get("from") or "").lower()
    role = _ROLES.get(name)
    if role is None:
        raise RowDroppedError(f"unknown role {name[:20]!r} in '{column}'")
    content = value.get("value") if value.get("content") is None else value["content"]
    extra = {key: value.get(key) for key in ("name", "tool_call_id")}
    weights = []
    if role == "assistant" and (content is None or len(value) > 2 or name == _CALL):
        weights = [value[k] for k in ("weight", "train", "trainable") if value.get(k) is not None]
        if any(weight not in (0, 1) for weight in weights):
            raise RowDroppedError(f"a weight other than 0 and 1 in '{column}'")
        calls, content = (content, "") if name == _CALL else (value.get("tool_calls"), content)
        extra["tool_calls"] = _functions(calls or value.get(_CALL), "tool_calls")
        content = "" if content is None and extra["tool_calls"] else content
        keys = [k for k in ("reasoning_content", "reasoning", "thinking") if value.get(k)]
        extra["reasoning_content"] = _text(value[keys[0]], column).strip() if keys else ""
    text, thoughts = _content(content, column, role)
    if not text and not (extra.get("tool_calls") or role in ("system", "tool")):
        raise RowDroppedError("empty prompt" if role == "user" else "empty response")
    extra |= {"reasoning_content": thoughts} if thoughts else {}
    extra = {key: item for key, item in extra.items() if item}
    return Message(role, text, int(all(weights)), _to_json(extra, column) if extra else "")


def _content(value: Any, column: str, role: Role) -> tuple[str, str]:
    """Return the text and the thoughts of a message's content, which may be a list of parts."""
    if isinstance(value, str):
        return _text(value, column).strip(), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None or kind == "text":
            texts.append(_text(part if kind is None else part.get("text"), column))
        elif kind in ("thinking", "reasoning") and role == "assistant":
            thoughts.append(_content(part.get(kind, part.get("text")), column, "user")[0])
        else:
            raise RowDroppedError(f"content of type {str(kind)[:20]!r} in '{column}'")
    return "\n".join(texts).strip(), "\n".join(thoughts).strip()


def _functions(value: Any, place: str) -> list[Row]:
    """Return tools or tool calls, which may be JSON text, in the form of OpenAI's API."""
    try:
        values = _parsed(value) or []
        functions: list[Row] = []
        for item in map(_parsed, values if isinstance(values, list) else [values]):
            tool = item if item.get("function") else {"type": "function", "function": item}
            function = {**tool["function"]}
            if place == "tool_calls":
                function["arguments"] = {**_parsed(function.get("arguments") or {})}
            functions.append(tool | {"function": function | {"name": function["name"]}})
        return functions
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise RowDroppedError(f"malformed '{place}'") from None


def _parsed(value: Any) -> Any:
    """Return what JSON text stands for; other values as they are."""
    return json.loads(value, strict=False) if isinstance(value, str) and value else value


def _to_json(value: object, place: str) -> str:
    try:
        return _text(json.dumps(value, ensure_ascii=False), place)
    except (RecursionError, TypeError, ValueError):
        raise RowDroppedError(f"malformed '{place}'") from None
