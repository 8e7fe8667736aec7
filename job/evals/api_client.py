"""A client of OpenAI-compatible chat endpoints, for a reference model far away.

An endpoint may answer 200 and still have failed (an `error` in the body, no choices, an empty
answer because reasoning used up the tokens): those are tried again or reported, never taken
for an answer. Error statuses are OpenRouter's: https://openrouter.ai/docs/api-reference/errors.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import requests
import urllib3

from job.chat.conversation import Conversation
from job.errors import SetupError
from job.runtime import logs
from job.spec.evals import Effort
from job.spec.schema import Reference
from job.storage.retry import retry_after

MARGIN = 2.0
"""A request in flight is taken to cost this many times the most that one cost so far."""


class Budget:
    """Lets a request go only where it fits; safe to use from several threads.

    What a request costs is known afterwards. The first is sent alone, to learn what one costs;
    from then on each in flight has dollars reserved for it, and one that does not fit waits
    for others to end, or is refused where none is under way.
    """

    def __init__(self, cap: float | None, spent: float = 0.0, most: float | None = None) -> None:
        """Args: spent: so far; most: what the dearest request cost, None where none is known."""
        self.cap = cap
        self._spent = spent
        self._most = most
        self._in_flight = 0
        self._unpriced = False
        self.refused = False
        """Whether a request was refused."""
        self._changed = threading.Condition()

    def reserve(self) -> str | None:
        """Wait until a request may be sent; the reason where it may not."""
        if self.cap is None:
            return None
        with self._changed:
            while not self._unpriced and not self._fits() and self._in_flight:
                self._changed.wait()
            if self._unpriced or not self._fits():
                self.refused = True
            if self._unpriced:
                return (
                    "the endpoint does not say what a request cost, so reference.max_usd cannot "
                    "be kept; remove it"
                )
            if not self._fits():
                return f"the budget of {self.cap:g} USD is used up; raise reference.max_usd"
            self._in_flight += 1
            return None

    def _fits(self) -> bool:
        assert self.cap is not None
        if self._most is None:
            return self._in_flight == 0 and self._spent < self.cap
        reserved = (self._in_flight + 1) * MARGIN * self._most
        return self._spent + reserved <= self.cap

    def settle(self, cost: float | None, *, lost: bool = False, answered: bool = False) -> None:
        """A request that was let go has ended.

        Args:
            cost: in dollars; None where the reply does not say.
            lost: its reply was lost, so it may have been billed: it counts as the dearest.
            answered: it was answered, so that a price was to be expected.
        """
        if self.cap is None:
            return
        with self._changed:
            self._in_flight -= 1
            if cost is not None:
                self._spent += cost
                self._most = max(self._most or 0.0, cost)
            elif lost:
                self._spent += self._most or 0.0
            elif answered:
                self._unpriced = True
            self._changed.notify_all()


RETRYABLE = (408, 409, 425, 429, 500, 502, 503, 504)


_REFUSALS = {401: "the key is refused", 402: "the account has no credit left"}


_LONGEST_WAIT = 60.0


_UNSUPPORTED = "the requested parameters"
"""In OpenRouter's 404 where no provider of the model supports all that was sent."""


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason there is none; with what all its attempts cost either way."""

    answer: str | None
    error: str | None = None
    provider: str | None = None
    model: str | None = None
    finish: str | None = None
    """Why the answer ended: stop, length, ..."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion tokens, those of reasoning."""
    cost_usd: float = 0.0
    lost: int = 0
    """Attempts whose reply was lost, which may have been billed beside `cost_usd`."""
    final: bool = False
    """There is no answer, and asking the same again would change nothing."""
    sent: bool = True
    """The question left this machine."""


@dataclass(frozen=True)
class _Attempt:
    """What became of one request."""

    reply: Reply
    again: bool = False
    """Another attempt may succeed."""
    after: float | None = None
    """Seconds that the server asks to wait before it."""
    cost: float | None = None
    """In dollars, where the reply says it."""


@dataclass
class ChatClient:
    """Asks one model, one prompt at a time; safe to use from several threads."""

    base_url: str
    key: str = field(repr=False)
    model: str
    max_tokens: int
    timeout_seconds: float
    attempts: int
    sleep: Callable[[float], object] = time.sleep
    openrouter: bool = False
    """Whether the endpoint has OpenRouter's extensions."""
    reasoning: Effort | None = None
    budget: Budget = field(default_factory=lambda: Budget(None))
    refused: str | None = None
    """Why no further question is sent: the key is refused, or there is no credit."""

    def ask(self, messages: Conversation, max_tokens: int | None = None) -> Reply:
        """Send one conversation, with retries; never raises for what the endpoint does.

        Args:
            messages: the conversation, which ends with a message of the user.
            max_tokens: another limit for this answer.
        """
        body = self._body(messages, max_tokens or self.max_tokens)
        so_far = Reply(None, sent=False)
        for attempt in range(self.attempts):
            if reason := self._reason_not_to():
                return _together(so_far, Reply(None, error=reason, sent=False))
            tried = self._attempt(body)
            self.budget.settle(
                tried.cost, lost=tried.reply.lost > 0, answered=tried.reply.answer is not None
            )
            so_far = _together(so_far, tried.reply)
            if not tried.again:
                return so_far
            if attempt + 1 < self.attempts:
                wait = min(_LONGEST_WAIT, 2.0**attempt) * random.uniform(0.5, 1.0)
                wait = min(_LONGEST_WAIT, max(wait, tried.after or 0.0))
                logs.get().info(
                    "asking again",
                    reason=so_far.error,
                    attempt=attempt + 1,
                    seconds=round(wait, 1),
                )
                self.sleep(wait)
        return replace(so_far, error=f"{so_far.error} (tried {self.attempts} times)")

    def _reason_not_to(self) -> str | None:
        """Why no request may be sent; None where one is reserved in the budget."""
        if reason := self.refused or self.budget.reserve():
            return reason
        if self.refused:  # meanwhile
            self.budget.settle(None)
        return self.refused

    def _body(self, messages: Conversation, max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if self.openrouter:
            # Else parameters that a provider does not support are dropped without a word.
            body["provider"] = {"require_parameters": True}
            if self.reasoning is not None:
                body["reasoning"] = {"effort": self.reasoning}
        elif self.reasoning not in (None, "none"):
            body["reasoning_effort"] = self.reasoning
        return body

    def _attempt(self, body: dict[str, Any]) -> _Attempt:
        try:
            response = requests.post(
                f"{self.base_url.rstrip('/')}/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {self.key}", "X-Title": "job"},
                timeout=self.timeout_seconds,
            )
        except requests.RequestException as error:
            lost = Reply(None, error=type(error).__name__, lost=int(_arrived(error)))
            return _Attempt(lost, again=True)
        status = response.status_code
        try:
            document = _clean(json.loads(response.content), self.key)
        except (ValueError, RecursionError):
            if status == 200:
                return _Attempt(Reply(None, error="the body is not JSON", lost=1), again=True)
            document = _clean(response.text, self.key)
        if status in RETRYABLE:
            after = retry_after(response.headers.get("Retry-After"))
            return _Attempt(Reply(None, error=f"HTTP {status}"), again=True, after=after)
        if status in _REFUSALS:
            self.refused = f"HTTP {status}: {_REFUSALS[status]}"
            return _Attempt(Reply(None, error=self.refused))
        if status != 200:
            return _Attempt(self._turned_down(status, _message(document)))
        return _read(document)

    def _turned_down(self, status: int, message: str) -> Reply:
        """The reply to a request that is wrong as it is."""
        error = f"HTTP {status}: {message}"
        if status == 404 and self.openrouter and _UNSUPPORTED in message:
            hint = "its providers may know no `reasoning`: set reference.reasoning to null"
            self.refused = f"{error} ({hint})"
            return Reply(None, error=self.refused, final=True)
        return Reply(None, error=error, final=True)


def _together(before: Reply, after: Reply) -> Reply:
    """The later reply, with what both cost."""
    return replace(
        after,
        sent=before.sent or after.sent,
        prompt_tokens=before.prompt_tokens + after.prompt_tokens,
        completion_tokens=before.completion_tokens + after.completion_tokens,
        reasoning_tokens=before.reasoning_tokens + after.reasoning_tokens,
        cost_usd=before.cost_usd + after.cost_usd,
        lost=before.lost + after.lost,
    )


def _arrived(error: requests.RequestException) -> bool:
    """Whether the request may have been carried out, though its reply did not come whole."""
    if isinstance(error, requests.ConnectTimeout):
        return False
    inner = error.args[0] if error.args else None
    return not isinstance(getattr(inner, "reason", inner), urllib3.exceptions.NewConnectionError)


def _clean(value: Any, key: str) -> Any:
    """A document without the key, which a server may repeat, and with text that UTF-8 can hold."""
    if isinstance(value, str):
        return value.replace(key, "[redacted]").encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(item, key) for item in value]
    if isinstance(value, dict):
        return {_clean(name, key): _clean(item, key) for name, item in value.items()}
    return value


def _message(document: Any) -> str:
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or document)[:200]


def _read(document: Any) -> _Attempt:
    """What a 200 really says."""
    if not isinstance(document, dict):
        return _Attempt(Reply(None, error=f"an error with status 200: {document}"[:200]), True)
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    details = details if isinstance(details, dict) else {}
    cost = _number(usage["cost"]) if _is_number(usage.get("cost")) else None
    reply = Reply(
        None,
        provider=_text(document.get("provider")),
        model=_text(document.get("model")),
        prompt_tokens=int(_number(usage.get("prompt_tokens"))),
        completion_tokens=int(_number(usage.get("completion_tokens"))),
        reasoning_tokens=int(_number(details.get("reasoning_tokens"))),
        cost_usd=cost or 0.0,
    )

    def again(error: str) -> _Attempt:
        return _Attempt(replace(reply, error=error), again=True, cost=cost)

    if document.get("error"):
        return again(f"an error with status 200: {_message(document)}")
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return again("no choices")
    finish = _text(choice.get("finish_reason"))
    if choice.get("error") or finish == "error":
        return again(f"an error in the choice: {_message(choice)}")
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str) or not content.strip():
        # Asking again would spend the same again for the same nothing.
        hint = "; raise reference.max_tokens" if finish == "length" else ""
        error = f"empty answer, finish_reason {finish!r}{hint}"
        return _Attempt(replace(reply, error=error, finish=finish, final=True), cost=cost)
    return _Attempt(replace(reply, answer=content, finish=finish), cost=cost)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0


KEY = "OPENROUTER_API_KEY"


def missing_key(reference: Reference) -> str | None:
    """What to tell the user if the key is not set.

    Raises:
        EnvironmentProblem: it is set to something that no key is.
    """
    key = os.environ.get(KEY, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise SetupError(f"{KEY} holds characters that no key has; set it again")
    if key:
        return None
    return f"{KEY} is not set: the comparison with {reference.model} will be skipped"
