"""From a row to an example: templates filled in, what cannot be used named and counted."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from job.data.sources import Row
from job.spec import Data
from job.spec_types import template_fields


@dataclass(frozen=True)
class Example:
    """One dialogue turn: what the user says and what the model should answer."""

    id: str
    """A hash of the content: the same text has the same id in any file, in any order."""
    system: str | None
    prompt: str
    response: str


class Dropped(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


def field_text(row: Row, field: str) -> str:
    """The text of a field.

    Raises:
        Dropped: it is missing, or is no text or number.
    """
    if field not in row:
        raise Dropped(f"no column '{field}'")
    value = row[field]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Dropped(f"null in '{field}'")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Dropped(f"not text in '{field}'")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Dropped(f"undecodable text in '{field}'") from None
    return text


def fill(template: str, row: Row) -> str:
    """A template with the row's fields in it; whitespace around the whole is removed.

    Raises:
        Dropped: a field it names is missing or is no text.
    """
    values: dict[str, Any] = {field: field_text(row, field) for field in template_fields(template)}
    return template.format(**values).strip()


class ExampleMapper:
    """Makes examples as the `data` section says."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __call__(self, row: Row) -> Example:
        """The example of a row.

        Raises:
            Dropped: the row cannot be used.
        """
        for name in ("prompt", "response"):
            template = getattr(self._data, name)
            fields = template_fields(template)
            if not any(field_text(row, field).strip() for field in fields):
                raise Dropped(f"empty {name}")
        prompt = fill(self._data.prompt, row)
        response = fill(self._data.response, row)
        system = fill(self._data.system, row) if self._data.system else None
        content = json.dumps([system, prompt, response]).encode()
        identity = hashlib.blake2b(content, digest_size=8).hexdigest()
        return Example(identity, system, prompt, response)
