"""Problems of a spec: pydantic's errors in plain words, each with its path and line.

Where a value was set on the command line, its problem is reported at the flag instead of a line.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from job.errors import Problem
from job.runtime.logs import TOKEN_SHAPES
from job.spec.schema import Spec

Location = tuple[str | int, ...]
"""A path in the document: keys, and indices of list items."""


def dotted(at: Location) -> str:
    """Return a location as messages and `--set` write it."""
    return ".".join(str(part) for part in at)


class SourceMap(dict[Location, str]):
    """Where each part of a spec came from, as 'file:line' or '--set key=value'; () is all of it."""

    def existing_part(self, at: Location) -> Location:
        """Return the part of a pydantic location that the document has, without union tags."""
        while at not in self:
            at = at[:-1]
        return at

    def problem(self, at: Location, message: str) -> Problem:
        """Return a problem at a location, found where that or its nearest parent came from."""
        return Problem(self[self.existing_part(at)], dotted(at), message)


def describe_errors(errors: Sequence[ErrorDetails], source: SourceMap) -> list[Problem]:
    """Return pydantic's errors as problems, one per location.

    A field of several types fails once for each of them; their messages are joined.
    """
    merged: dict[tuple[str, str], list[str]] = {}
    for problem in (_describe(error, source) for error in errors):
        messages = merged.setdefault((problem.where, problem.path), [])
        message = problem.message
        if messages:
            message = message.partition(" (got ")[0]
        if message not in messages:
            messages.append(message)
    return [Problem(*place, ", or ".join(messages)) for place, messages in merged.items()]


def _describe(error: ErrorDetails, source: SourceMap) -> Problem:
    at = source.existing_part(error["loc"])
    kind, value = error["type"], error["input"]
    if kind == "missing":
        place = (*at, error["loc"][-1]) if at != error["loc"] else at
        return source.problem(place, "required, but missing")
    if kind == "extra_forbidden":
        message = _unknown_key(error["loc"])
    elif kind == "value_error":
        message = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
        # A check of several fields begins with the field to change.
        if first := re.match(r"`([\w.]+)`", message):
            parts = (int(part) if part.isdecimal() else part for part in first[1].split("."))
            at = (*at, *parts)
    elif kind == "string_pattern_mismatch":
        message = (
            f"{value!r} may hold only lowercase letters, digits, '.', '_' and '-', "
            "and must begin and end with a letter or digit"
        )
    elif isinstance(value, dict | list) and len(str(value)) > 60:
        message = f"{error['msg'].lower()} (got a {type(value).__name__})"
    else:
        message = f"{error['msg'].replace('Input should', 'should')} (got {value!r})"
    return source.problem(at, message)


def _unknown_key(at: Location) -> str:
    known = _keys_at(at[:-1])
    near = difflib.get_close_matches(str(at[-1]), known, 1)
    if near:
        return f"unknown key; did you mean '{near[0]}'?"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def _keys_at(location: Location) -> list[str]:
    """Return the field names of the model at a location of the spec."""
    model: Any = Spec
    for part in location:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _section_type(fields[part].annotation)
    return sorted(getattr(model, "model_fields", {}))


def _section_type(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_type, get_args(annotation))), None)


def forbidden_text(value: object, source: SourceMap, at: Location = ()) -> Iterator[Problem]:
    """Yield a problem for each string that looks like a secret or holds `${...}`."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from forbidden_text(child, source, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from forbidden_text(child, source, (*at, index))
    elif isinstance(value, str) and TOKEN_SHAPES.search(value):
        message = "looks like a secret; secrets come from the environment only (HF_TOKEN, ...)"
        yield source.problem(at, message)
    elif isinstance(value, str) and "${" in value:
        message = f"{value!r} holds ${{...}}, which is not expanded; write the value, or use --set"
        yield source.problem(at, message)


def in_file_order(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems without repeats, in the order of the file, flags last."""

    def position(problem: Problem) -> tuple[int, int]:
        line = problem.where.rsplit(":", 1)[-1]
        in_file = line.isdigit() and not problem.where.startswith("--set")
        return (0, int(line)) if in_file else (1, 0)

    return sorted(dict.fromkeys(problems), key=position)
