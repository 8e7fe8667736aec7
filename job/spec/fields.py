"""Field types of the spec: numbers, names, datasets, outputs and text templates.

A template is text with plain `{field}` names and no other feature of Python's format strings: a
spec must never reach into Python objects.
"""

import re
import string
from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
)

SAMPLES = "samples"
"""Value of `dataset` for the data shipped with the package."""

TINY, SMOLLM2 = BUILT_PRESETS = ("tiny", "smollm2-135m-instruct")
"""Values of `preset` for models that this job builds; no other program knows these names."""

FILE_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Extensions of files that rows can be read from."""

COMPRESSIONS = ("", ".gz", ".zst", ".bz2")
"""Extensions of compressed files, which may follow; not for Parquet and Arrow."""

LETTERS = string.ascii_uppercase
LM_EVAL = "lm-eval"
"""Value of `prompt` for lm-evaluation-harness's MedMCQA prompt."""

HUB = r"hf://[\w.-]+/[\w.-]+"
_NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=63)]


def is_template_file(name: str) -> bool:
    """Return whether `model.chat_template` names a file."""
    return "/" in name or name.endswith(".jinja")


def template_fields(template: str) -> list[str]:
    """Return the field names of a text template, in order.

    A template is text with `{field}` in it; `{{` and `}}` stand for braces.

    Raises:
        ValueError: it has more than plain field names: attributes, indices, conversions or
            formats.
    """
    fields = []
    for _, field, form, conversion in string.Formatter().parse(template):
        if field is None:
            continue
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ -]*", field) or form or conversion:
            shown = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"the template may hold only plain field names, like {{question}}; got {{{shown}}}"
            )
        fields.append(field)
    return fields


def template_parts(template: str) -> tuple[list[str], list[str]]:
    """Split a template into the texts around its fields (one more than fields) and the fields."""
    literals, fields = [""], []
    for literal, field, _, _ in string.Formatter().parse(template):
        literals[-1] += literal
        if field is not None:
            fields.append(field)
            literals.append("")
    return literals, fields


def names_a_file(dataset: str) -> bool:
    """Return whether a path has the extension of a file that rows can be read from."""
    text = dataset.lower()
    return any(text.endswith(f + c) for f in FILE_EXTENSIONS for c in COMPRESSIONS)


def _check_template(value: object) -> object:
    if isinstance(value, str):
        try:
            fields = template_fields(value)
        except ValueError as error:
            if "template may hold" in str(error):
                raise
            raise ValueError(f"the template {value!r} has unbalanced braces ({error})") from None
        if not fields:
            raise ValueError(
                f"the template {value!r} names no field; "
                "write a column in braces, like {question}"
            )
    return value


def _check_question_prompt(value: object) -> object:
    return value if value == LM_EVAL else _check_template(value)


def _check_dataset(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.startswith("hf://"):
        if not re.fullmatch(HUB, value):
            raise ValueError(f"{value!r} is not a dataset on the Hub; write hf://owner/name")
    elif value.startswith("gs://"):
        if not re.fullmatch(r"gs://[a-z0-9][\w.-]+(/.*)?", value):
            raise ValueError(f"{value!r} names no object; write gs://bucket/path")
    elif "://" in value:
        scheme = value.split("://")[0]
        raise ValueError(
            f"{scheme}:// is not supported here; use hf://owner/name, gs://bucket/path, a local "
            f"file, or '{SAMPLES}'"
        )
    return value


def _check_output(value: object) -> object:
    if isinstance(value, str) and "://" in value and not re.match(r"gs://[a-z0-9][\w.-]+", value):
        raise ValueError(f"{value!r} is neither a local folder nor gs://bucket/prefix")
    return value


def _check_optional_template(value: object) -> object:
    if isinstance(value, str) and "{" in value:
        _check_template(value)
    return value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"should be a number (got {value})")
    return value


Template = Annotated[str, BeforeValidator(_check_template)]
Dataset = Annotated[str, BeforeValidator(_check_dataset), Field(min_length=1)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool)]
QuestionPrompt = Annotated[str, BeforeValidator(_check_question_prompt)]
OptionalTemplate = Annotated[str, BeforeValidator(_check_optional_template)]
Output = Annotated[str, BeforeValidator(_check_output)]
