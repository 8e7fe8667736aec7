"""A client of OpenAI-compatible chat endpoints, for a reference model far away.

An endpoint may answer 200 and still have failed (an `error` in the body, no choices, an empty
answer because reasoning used up the tokens): those are tried again or reported, never taken
for an answer. Error statuses are OpenRouter's: https://openrouter.ai/docs/api-reference/errors.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import requests

from job import logs
from job.errors import EnvironmentProblem

RETRYABLE = (408, 409, 425, 429, 500, 502, 503, 504)
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

    def ask(self, prompt: str, system: str | None = None) -> Reply:
        """One question, with retries.

        Raises:
            EnvironmentProblem: the key is refused, or the account has no credit left.
        """
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "usage": {"include": True},
        }
        reason = ""
        for attempt in range(self.attempts):
            try:
                return self._attempt(body)
            except _Retry as retry:
                reason = self._clean(str(retry))
                if attempt + 1 < self.attempts:
                    wait = min(_LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
                    wait = min(_LONGEST_WAIT, max(wait, retry.after or 0.0))
                    logs.get().info(
                        "asking again", reason=reason, attempt=attempt + 1, seconds=wait
                    )
                    self.sleep(wait)
        return Reply(None, error=self._clean(f"{reason} (tried {self.attempts} times)"))

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
        if status in (401, 402, 403):
            meaning = {401: "the key is refused", 402: "the account has no credit left"}
            raise EnvironmentProblem(
                f"reference: {self.base_url} answered {status}: "
                f"{meaning.get(status, 'access is refused')}; check OPENROUTER_API_KEY"
                " and the account"
            )
        try:
            document = response.json()
        except ValueError:
            raise _Retry("the body is not JSON") from None
        if status != 200:
            return Reply(None, error=self._clean(f"HTTP {status}: {_message(document)}"))
        return _reply(document)


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
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
        "cost_usd": float(usage.get("cost") or 0.0),
    }
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or not content.strip():
        # Asking again would spend the same again for the same nothing.
        finish = choice.get("finish_reason")
        hint = "; raise reference.max_tokens" if finish == "length" else ""
        return Reply(None, error=f"empty answer, finish_reason {finish!r}{hint}", **fields)
    return Reply(content, **fields)
