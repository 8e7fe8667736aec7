"""Structured logs: a line for people on a terminal, JSON lines elsewhere and in the run.

The JSON has the field names that Cloud Logging reads (`severity`, `message`, `time`). Every event
also becomes a line of the run's `logs/job.jsonl`. Secrets are redacted before anything is written.
"""

import json
import logging
import math
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog

_NOISY = (
    "absl", "datasets", "filelock", "fsspec", "huggingface_hub", "jax", "matplotlib", "urllib3",
)  # fmt: skip
Event = MutableMapping[str, Any]


def configure(
    write_line: Callable[[str], None] | None = None,
    stream: TextIO | None = None,
    *,
    least: int = logging.INFO,
) -> None:
    """Configure structlog for this process, and silence the libraries.

    Args:
        write_line: gets every line as JSON, with its line break.
        stream: for the lines; by default `sys.stdout` at the time of each line, so that a progress
            bar can stay below them.
        least: the lowest level to log.
    """
    redactor = Redactor(os.environ)

    def redact(_logger: object, _method: str, event: Event) -> Event:
        cleaned: Event = redactor.value(event)
        return cleaned

    terminal = (stream or sys.stdout).isatty()
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)

    def tee(_logger: object, _method: str, event: Event) -> Event:
        if write_line is not None:
            write_line(json.dumps(_cloud(event), ensure_ascii=False, default=str) + "\n")
        return event

    processors: list[Any] = [structlog.contextvars.merge_contextvars, _stamp, redact, tee]
    processors.append(_for_people if terminal else _as_json)
    structlog.configure(
        processors=processors,
        logger_factory=lambda *_: structlog.WriteLogger(stream),
        wrapper_class=structlog.make_filtering_bound_logger(least),
        cache_logger_on_first_use=False,
    )


def _stamp(_logger: object, method: str, event: Event) -> Event:
    event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event["severity"] = {"warning": "WARNING", "error": "ERROR"}.get(method, "INFO")
    return event


def _cloud(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event with Cloud Logging's field names first."""
    rest = {key: value for key, value in event.items() if key not in ("event", "time", "severity")}
    return {
        "severity": event["severity"],
        "time": event["time"],
        "message": event["event"],
        **rest,
    }


def _as_json(_logger: object, _method: str, event: Event) -> str:
    """Format a line for Cloud Logging's agents, with labels to filter by."""
    line = _cloud(event)
    labels = {key: str(line[key]) for key in ("run_id", "stage", "process") if key in line}
    if labels:
        line["logging.googleapis.com/labels"] = labels
    return json.dumps(line, ensure_ascii=False, default=str)


_COLORS = {"INFO": "", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m"}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


def _for_people(_logger: object, _method: str, event: Event) -> str:
    clock = time.strftime("%H:%M:%S")
    color = _COLORS[event["severity"]]
    hidden = ("event", "time", "severity", "stage", "run_id")
    details = "  ".join(
        f"{key}={_short(value)}" for key, value in event.items() if key not in hidden
    )
    stage = event.get("stage", "")
    line = f"{_DIM}{clock} {stage:<9}{_RESET} {color}{_one_line(event['event'])}{_RESET}"
    return f"{line}  {_DIM}{_one_line(details)}{_RESET}" if details else line


def _one_line(text: object) -> str:
    return legible(str(text)).replace("\n", "\N{RETURN SYMBOL}").replace("\t", " ")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_short(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(_short(item) for item in value)
    return str(value)


def get() -> Any:
    """Return the logger; events are three to five words, values are keyword arguments."""
    return structlog.get_logger()


SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENROUTER_API_KEY", "KAGGLE_KEY")
REDACTED = "[redacted]"
TOKEN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|ya29\.[A-Za-z0-9_.-]{16,}|AIza[A-Za-z0-9_-]{30,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
    r"|(?i:(?<=bearer ))[A-Za-z0-9._~+/-]{8,}=*"
    r"|(?s:-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
)
_NAMED_SECRETS = re.compile(
    r"(?i)(?P<name>://[^/\s:@]*:(?=[^/\s@]+@)|authorization\W{1,4}basic "
    r"|[?&](?:[\w-]*(?:signature|token|secret|password)|sig|key|api_?key)=)[^&\s\"'@]+"
)
"""Passwords and tokens of URLs, and the Basic scheme: what stands before them stays."""

_SECRET_NAMES = re.compile(r"(?i)(^|[_-])(token|api[_-]?key|secret|password|authorization)$")


class Redactor:
    """A filter for secrets: those of the environment, and anything shaped like one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = (environment.get(name, "").strip() for name in SECRET_VARIABLES)
        self._values = sorted((value for value in values if len(value) >= 6), key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return `text` with every secret replaced, and lone surrogates made printable."""
        for value in self._values:
            text = text.replace(value, REDACTED)
        text = _NAMED_SECRETS.sub(rf"\g<name>{REDACTED}", TOKEN_SHAPES.sub(REDACTED, text))
        return text.encode("utf-8", "backslashreplace").decode()

    def value(self, value: Any) -> Any:
        """Return a nested value without secrets; a value that JSON lacks becomes text first."""
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): REDACTED
                if _SECRET_NAMES.search(str(key)) and isinstance(item, str)
                else self.value(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item) for item in value]
        return self.text(str(value))


def legible(text: str) -> str:
    """Return the text with every invisible or direction-changing character shown by its code.

    Line breaks, tabs and the joiners that scripts and emoji need stay.
    """

    def shown(char: str) -> str:
        if char.isprintable() or char in "\n\t\u200c\u200d" or unicodedata.category(char) == "Zs":
            return char
        # Not Unicode's control pictures: few fonts have them.
        return f"\u2039U+{ord(char):04X}\u203a"

    return text if text.isprintable() else "".join(map(shown, text.replace("\r\n", "\n")))
