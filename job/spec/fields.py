"""Field types of the spec: numbers, names, datasets, outputs and text templates.

A template is text with names of columns in braces. It is no format string of Python: a spec must
never reach into Python objects.
"""

import re
import string
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

SAMPLES = "samples"
"""Value of `dataset` for the data shipped with the package."""

TINY, SMOLLM2 = BUILT_PRESETS = ("tiny", "smollm2-135m-instruct")
"""Values of `preset` for models that this job builds; no other program knows these names."""

FILE_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Extensions of files that rows can be read from."""

_COMPRESSIONS = (".gz", ".zst", ".bz2")
_UNCOMPRESSED = (".parquet", ".arrow")
"""Extensions that none for a compression may follow."""

LETTERS = string.ascii_uppercase
LM_EVAL = "lm-eval"
"""Value of `prompt` for lm-evaluation-harness's MedMCQA prompt."""

_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
HUB = rf"hf://(?!.*\.\.){_HUB_NAME}/{_HUB_NAME}"
"""A repository of the Hub; its names are parts of paths and addresses."""

_BRACES = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]")
_COLUMN = re.compile(r""" *[^\s"'][^\n]*""")
"""A column; JSON that was meant as text is none."""

_NAME = r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=63)]


def is_template_file(name: str) -> bool:
    """Return whether `model.chat_template` names a file."""
    return "/" in name or name.endswith(".jinja")


def template_parts(template: str) -> tuple[list[str], list[str]]:
    """Split a template into the texts around its fields (one more than fields) and the fields.

    A field is the name of a column in braces; `{{` and `}}` stand for braces.

    Raises:
        ValueError: a brace has no partner, or what it encloses names no column.
    """
    literals, fields, at = [""], [], 0
    for match in _BRACES.finditer(template):
        literals[-1] += template[at : match.start()]
        at = match.end()
        if match[0] in ("{{", "}}"):
            literals[-1] += match[0][0]
        elif match["field"] is None:
            raise ValueError(
                f"the template {template!r} has unbalanced braces; write {{{{ or }}}} for a brace "
                "of the text"
            )
        elif not _COLUMN.fullmatch(match["field"]):
            raise ValueError(
                "the template may hold columns in braces, like {question}, and braces of the text "
                f"twice, like {{{{; got {match[0]}"
            )
        else:
            fields.append(match["field"])
            literals.append("")
    literals[-1] += template[at:]
    return literals, fields


def template_fields(template: str) -> list[str]:
    """Return the columns that a template names, in order; see `template_parts`."""
    return template_parts(template)[1]


def fill_template(template: str, texts: Sequence[str]) -> str:
    """Return a template with a text in place of each of its fields."""
    literals, _ = template_parts(template)
    pairs = zip(literals, [*texts, ""], strict=True)
    return "".join(part for pair in pairs for part in pair)


def file_format(name: str) -> str | None:
    """Return the extension that tells a file's format (`.json` of `a/B.JSON.gz`), or None."""
    path = PurePosixPath(name.lower())
    if path.suffix in _COMPRESSIONS and path.with_suffix("").suffix not in _UNCOMPRESSED:
        path = path.with_suffix("")
    return path.suffix if path.suffix in FILE_EXTENSIONS else None


def _check_template(value: str) -> str:
    if not template_fields(value):
        raise ValueError(
            f"the template {value!r} names no field; write a column in braces, like {{question}}"
        )
    return value


def _check_question_prompt(value: str) -> str:
    return value if value == LM_EVAL else _check_template(value)


def _check_dataset(value: str) -> str:
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


def _check_output(value: str) -> str:
    if "://" in value and not re.match(r"gs://[a-z0-9][\w.-]+", value):
        raise ValueError(f"{value!r} is neither a local folder nor gs://bucket/prefix")
    return value


def _check_optional_template(value: str) -> str:
    return _check_template(value) if "{" in value else value


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"should be a number (got {value})")
    return value


Template = Annotated[str, AfterValidator(_check_template)]
Dataset = Annotated[str, AfterValidator(_check_dataset), Field(min_length=1)]
Positive = Annotated[int, Field(gt=0, strict=True)]
Number = Annotated[float, BeforeValidator(_no_bool)]
QuestionPrompt = Annotated[str, AfterValidator(_check_question_prompt)]
OptionalTemplate = Annotated[str, AfterValidator(_check_optional_template)]
Output = Annotated[str, AfterValidator(_check_output)]
Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
