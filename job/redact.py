"""Secrets never leave: known ones and token-shaped text are replaced before anything is written."""

import math
import re
from collections.abc import Mapping
from typing import Any

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENROUTER_API_KEY", "KAGGLE_KEY")
REDACTED = "[redacted]"

TOKEN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|ya29\.[A-Za-z0-9_.-]{16,}|AIza[A-Za-z0-9_-]{30,})"
    r"|(?i:(?<=bearer ))[A-Za-z0-9._~+/-]{8,}=*"
)
_SECRET_NAMES = re.compile(r"(?i)(^|[_-])(token|api[_-]?key|secret|password|authorization)$")


class Redactor:
    """Replaces secrets in any value: those of the environment, and anything shaped like one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = (environment.get(name, "").strip() for name in SECRET_VARIABLES)
        self._values = sorted((value for value in values if len(value) >= 6), key=len, reverse=True)

    def text(self, text: str) -> str:
        """`text` with every secret in it replaced, and lone surrogates made printable."""
        for value in self._values:
            text = text.replace(value, REDACTED)
        return TOKEN_SHAPES.sub(REDACTED, text).encode("utf-8", "backslashreplace").decode()

    def value(self, value: Any) -> Any:
        """The same for nested values; what JSON has no form for becomes text first."""
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
