"""A client of OpenAI-compatible chat endpoints, for a reference model far away.

An endpoint may answer 200 and still have failed (an `error` in the body, no choices, an empty
answer because reasoning used up the tokens): those are tried again or reported, never taken
for an answer. Error statuses are OpenRouter's: https://openrouter.ai/docs/api-reference/errors.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import requests

from job import logs

RETRYABLE = (408, 409, 425, 429, 500, 502, 503, 504)
_REFUSALS = {401: "the key is refused", 402: "the account has no credit left"}
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason there is none; with what it cost either way."""

    answer: str | None
    error: str | None = None
    provider: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    final: bool = False
    """There is no answer, and asking the same again would change nothing."""
    sent: bool = True
    """The question left this machine."""


class _Retry(Exception):
    """This attempt failed, and another may not; `after` is what the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass
class ChatClient:
    """Asks one model, one prompt at a time; safe to use from several threads."""

    base_url: str
    key: str = field(repr=False)
    model: str
    max_tokens: int
    timeout_seconds: float
    attempts: int
    sleep: Callable[[float], None] = time.sleep
    refused: str | None = None
    """Why no further question is sent: the key is refused, or there is no credit."""

    def ask(
        self, prompt: str, system: str | None = None, history: Sequence[tuple[str, str]] = ()
    ) -> Reply:
        """One question, with retries; never raises for what the endpoint does.

        Args:
            history: what was said before, pairs of prompt and answer.
        """
        messages = []
        for said, answered in history:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": prompt})
        if system:
            messages.insert(0, {"role": "system", "content": system})
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        reason = ""
        for attempt in range(self.attempts):
            if self.refused:
                return Reply(None, error=self.refused, sent=False)
            try:
                return self._attempt(body)
            except _Retry as retry:
                reason = self._clean(str(retry))
                if attempt + 1 < self.attempts:
                    wait = min(_LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
                    wait = min(_LONGEST_WAIT, max(wait, retry.after or 0.0))
                    logs.get().info(
                        "asking again", reason=reason, attempt=attempt + 1, seconds=round(wait, 1)
                    )
                    self.sleep(wait)
        return Reply(None, error=f"{reason} (tried {self.attempts} times)")

    def _clean(self, text: str) -> str:
        """A server may repeat the key in its messages, and errors are kept on file."""
        return text.replace(self.key, "[redacted]")

    def _attempt(self, body: dict[str, Any]) -> Reply:
        try:
            response = requests.post(
                f"{self.base_url.rstrip('/')}/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {self.key}", "X-Title": "job"},
                timeout=self.timeout_seconds,
            )
        except requests.RequestException as error:
            raise _Retry(f"{type(error).__name__}") from error
        status = response.status_code
        if status in RETRYABLE:
            raise _Retry(f"HTTP {status}", _retry_after(response))
        if status in _REFUSALS:
            self.refused = f"HTTP {status}: {_REFUSALS[status]}"
            return Reply(None, error=self.refused)
        try:
            document = response.json()
        except ValueError:
            if status == 200:
                raise _Retry("the body is not JSON") from None
            document = response.text
        if status != 200:
            return Reply(
                None, error=self._clean(f"HTTP {status}: {_message(document)}"), final=True
            )
        reply = _reply(document)
        return replace(reply, error=self._clean(reply.error)) if reply.error else reply


def _retry_after(response: requests.Response) -> float | None:
    try:
        return max(0.0, float(response.headers.get("Retry-After", "")))
    except ValueError:
        return None


def _message(document: Any) -> str:
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or document)[:200]


def _reply(document: Any) -> Reply:
    """What a 200 really says.

    Raises:
        _Retry: it says that something failed.
    """
    if not isinstance(document, dict) or document.get("error"):
        raise _Retry(f"an error with status 200: {_message(document)}")
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _Retry("no choices")
    if choice.get("error") or choice.get("finish_reason") == "error":
        raise _Retry(f"an error in the choice: {_message(choice)}")
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    fields: dict[str, Any] = {
        "provider": document.get("provider"),
        "model": document.get("model"),
        "prompt_tokens": int(_number(usage.get("prompt_tokens"))),
        "completion_tokens": int(_number(usage.get("completion_tokens"))),
        "cost_usd": _number(usage.get("cost")),
    }
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or not content.strip():
        # Asking again would spend the same again for the same nothing.
        finish = choice.get("finish_reason")
        hint = "; raise reference.max_tokens" if finish == "length" else ""
        error = f"empty answer, finish_reason {finish!r}{hint}"
        return Reply(None, error=error, final=True, **fields)
    return Reply(content, **fields)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value == value else 0.0
