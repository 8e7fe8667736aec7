"""A client of OpenAI-compatible chat APIs, for the reference model and the judge.

A reply of status 200 may still be a failure (an `error` in the body, no choices, an empty answer
because reasoning used up the tokens). Such replies are retried or reported, and never counted as
answers. Error statuses are OpenRouter's: https://openrouter.ai/docs/api-reference/errors.
"""

import itertools
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import requests
import urllib3

from job.chat.conversation import Conversation
from job.chat.thoughts import split_thoughts
from job.errors import SetupError
from job.evals.budget import Budget
from job.evals.predictions import Reply
from job.runtime import logs
from job.spec.remote import Endpoint
from job.storage.certificates import certificate_problem
from job.storage.retry import retry_after

API_KEY_VARIABLE = "OPENROUTER_API_KEY"
_RETRYABLE = (408, 409, 425, 429, 500, 502, 503, 504)
_FATAL = {
    401: f"the API key in {API_KEY_VARIABLE} was rejected",
    402: "the account is out of credit",
}
_MAX_WAIT_SECONDS = 60.0
_MAX_REPLY_BYTES = 16_000_000
_CHUNK_BYTES = 65_536
_NEW_LIMIT = "max_completion_tokens"
"""What newer models want instead of `max_tokens`, and name in their refusal."""

_UNSUPPORTED = "the requested parameters"
"""Part of OpenRouter's 404 when no provider of the model supports all parameters."""


@dataclass(frozen=True)
class _Attempt:
    """The outcome of one request."""

    reply: Reply
    can_retry: bool = False
    retry_after: float | None = None
    """Seconds to wait before a retry, where the server requests it."""
    cost: float | None = None
    """Dollars, where the reply reports it."""


@dataclass
class ChatClient:
    """A client of a remote model; thread-safe."""

    endpoint: Endpoint
    key: str = field(repr=False)
    budget: Budget = field(default_factory=lambda: Budget(None))
    sleep: Callable[[float], object] = time.sleep
    _limit: str = "max_tokens"
    closed: str | None = None
    """Reason why no more requests are sent, such as a refused key."""

    def complete(self, messages: Conversation, max_tokens: int | None = None) -> Reply:
        """Return the model's reply, with retries; failures of the endpoint raise nothing.

        Args:
            messages: a conversation that ends with a message of the user.
            max_tokens: limit of this answer, instead of the spec's.
        """
        body = self._body(messages, max_tokens or self.endpoint.max_tokens)
        total = Reply(sent=False)
        for number in range(1, self.endpoint.attempts + 1):
            if reason := self._reserve():
                return _add_usage(total, Reply(error=reason, sent=False))
            attempt = self._send(body)
            reply = attempt.reply
            self.budget.settle(attempt.cost, lost=reply.lost > 0, answered=reply.answer is not None)
            total = _add_usage(total, reply)
            if not attempt.can_retry:
                return total
            if number < self.endpoint.attempts:
                wait = min(_MAX_WAIT_SECONDS, 2.0 ** (number - 1)) * random.uniform(0.5, 1.0)
                wait = min(_MAX_WAIT_SECONDS, max(wait, attempt.retry_after or 0.0))
                logs.get().info(
                    "retrying request", reason=reply.error, attempt=number, seconds=round(wait, 1)
                )
                self.sleep(wait)
        return replace(total, error=f"{total.error} (tried {self.endpoint.attempts} times)")

    def _reserve(self) -> str | None:
        """Reserve a request in the budget; return the reason if none may be sent."""
        if reason := self.closed or self.budget.reserve():
            return reason
        if self.closed:  # another thread closed it during the wait
            self.budget.settle(None)
        return self.closed

    def _body(self, messages: Conversation, max_tokens: int) -> dict[str, Any]:
        reasoning = self.endpoint.reasoning
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": _openai_form([m for m in messages if m.role != "tools"]),
            "temperature": 0,
            self._limit: max_tokens,
        }
        if messages[0].role == "tools":
            body["tools"] = json.loads(messages[0].content)
        if self.endpoint.is_openrouter:
            # Otherwise OpenRouter silently drops parameters that a provider does not support.
            body["provider"] = {"require_parameters": True}
            if self.budget.max_usd is not None:
                body["provider"]["max_price"] = _max_price(self.budget.max_usd, body, max_tokens)
            if reasoning is not None:
                body["reasoning"] = {"effort": reasoning}
        elif reasoning not in (None, "none"):
            body["reasoning_effort"] = reasoning
        return body

    def _send(self, body: dict[str, Any]) -> _Attempt:
        deadline = time.monotonic() + self.endpoint.timeout_seconds
        try:
            with requests.post(
                f"{self.endpoint.base_url.rstrip('/')}/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {self.key}", "X-Title": "job"},
                auth=lambda request: request,  # not from .netrc, which would replace the key
                timeout=self.endpoint.timeout_seconds,
                stream=True,
                allow_redirects=False,  # neither the key nor the prompt goes elsewhere
            ) as response:
                content = _read(response, deadline)
        except requests.RequestException as error:
            if problem := certificate_problem(error):
                self.closed = problem
                return _Attempt(Reply(error=problem))
            lost = int(_may_be_billed(error))
            return _Attempt(Reply(error=type(error).__name__, lost=lost), can_retry=True)
        status = response.status_code
        try:
            document = _sanitize(json.loads(content), self.key)
        except (ValueError, RecursionError):
            if content.startswith((b"data:", b"event:", b":")):
                self.closed = "the endpoint sends a stream, which is not read; use another base_url"
                return _Attempt(Reply(error=self.closed, lost=1))
            if status == 200:
                reply = Reply(error="the body is not JSON", lost=1)
                return _Attempt(reply, can_retry=True)
            document = _sanitize(content.decode("utf-8", "replace"), self.key)
        if status == 200:
            return _parse_completion(document)
        if response.is_redirect:
            place = response.headers["Location"][:100]
            document = {"error": f"it redirects to {place}; set base_url to the right address"}
        if status in _RETRYABLE:
            wait = retry_after(response.headers.get("Retry-After"))
            return _Attempt(Reply(error=f"HTTP {status}"), can_retry=True, retry_after=wait)
        if status in _FATAL:
            self.closed = f"HTTP {status}: {_FATAL[status]}"
            return _Attempt(Reply(error=self.closed))
        message = _error_message(document)
        if _NEW_LIMIT in message and "max_tokens" in body:
            self._limit = _NEW_LIMIT
            limit = body.pop("max_tokens")
            return self._send(body | {_NEW_LIMIT: limit})
        return _Attempt(self._rejection(status, message))

    def _rejection(self, status: int, message: str) -> Reply:
        """Return the reply to an invalid request."""
        error = f"HTTP {status}: {message}"
        if status == 404 and self.endpoint.is_openrouter and _UNSUPPORTED in message:
            error += (
                " (its providers may not support `reasoning`: set "
                f"{self.endpoint.path}.reasoning to null)"
            )
            self.closed = error
        elif status == 404 and self.budget.max_usd is not None:
            error += f" (no provider may be cheap enough for {self.endpoint.path}.max_usd)"
        return Reply(error=error, final=True)


class ReplyTooLargeError(requests.RequestException):
    """A reply that no answer is as large as."""


def _read(response: requests.Response, deadline: float) -> bytes:
    """Return the body of a reply, unless it is too large or not complete by the deadline."""
    content = bytearray()
    try:
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=True):
            content += chunk
            if len(content) > _MAX_REPLY_BYTES:
                raise ReplyTooLargeError
            if time.monotonic() > deadline:
                raise requests.ReadTimeout("the reply takes too long")
    except urllib3.exceptions.HTTPError as error:
        raise requests.exceptions.ChunkedEncodingError(error) from error
    return bytes(content)


def _max_price(max_usd: float, body: dict[str, Any], max_tokens: int) -> dict[str, float]:
    """Return the prices of a million tokens at which one request cannot cost more than a budget.

    A token of the prompt has at least one byte, and half of the budget is for the prompt.
    """
    half = max_usd / 2 * 1e6
    return {"prompt": half / len(json.dumps(body).encode()), "completion": half / max_tokens}


def _openai_form(messages: Conversation) -> list[dict[str, Any]]:
    """Return the messages of a request; tool calls and their results without ids get some."""
    form = []
    made, answered = itertools.count(1), itertools.count(1)
    for message in messages:
        keys = json.loads(message.extra or "{}")
        keys.pop("reasoning_content", None)
        for call in keys.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            call.setdefault("id", f"call_{next(made)}")
        if message.role == "tool":
            keys.setdefault("tool_call_id", f"call_{next(answered)}")
        form.append({"role": message.role, "content": message.content} | keys)
    return form


def _add_usage(total: Reply, reply: Reply) -> Reply:
    """Return the later reply with the usage of both."""
    return replace(
        reply,
        sent=total.sent or reply.sent,
        prompt_tokens=total.prompt_tokens + reply.prompt_tokens,
        completion_tokens=total.completion_tokens + reply.completion_tokens,
        reasoning_tokens=total.reasoning_tokens + reply.reasoning_tokens,
        cost_usd=total.cost_usd + reply.cost_usd,
        lost=total.lost + reply.lost,
    )


def _may_be_billed(error: requests.RequestException) -> bool:
    """Return whether the server may have received the request, though its reply was lost."""
    if isinstance(error, requests.ConnectTimeout):
        return False
    inner = error.args[0] if error.args else None
    return not isinstance(getattr(inner, "reason", inner), urllib3.exceptions.NewConnectionError)


def _sanitize(value: Any, key: str) -> Any:
    """Redact the key, which a server may repeat, and replace text that UTF-8 cannot encode."""
    if isinstance(value, str):
        return value.replace(key, "[redacted]").encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_sanitize(item, key) for item in value]
    if isinstance(value, dict):
        return {_sanitize(name, key): _sanitize(item, key) for name, item in value.items()}
    return value


def _error_message(document: Any) -> str:
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or document)[:200]


def _parse_completion(document: Any) -> _Attempt:
    """Return the outcome that the body of a 200 reports."""
    if not isinstance(document, dict):
        reply = Reply(error=f"an error with status 200: {document}"[:200])
        return _Attempt(reply, can_retry=True)
    usage = _dict(document.get("usage"))
    details = _dict(usage.get("completion_tokens_details"))
    cost = _number(usage.get("cost"))
    reply = Reply(
        provider=_text(document.get("provider")),
        model=_text(document.get("model")),
        prompt_tokens=int(_number(usage.get("prompt_tokens")) or 0),
        completion_tokens=int(_number(usage.get("completion_tokens")) or 0),
        reasoning_tokens=int(_number(details.get("reasoning_tokens")) or 0),
        cost_usd=cost or 0.0,
    )

    def failure(error: str) -> _Attempt:
        return _Attempt(replace(reply, error=error), can_retry=True, cost=cost)

    if document.get("error"):
        return failure(f"an error with status 200: {_error_message(document)}")
    choices = document.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return failure("no choices")
    finish = _text(choice.get("finish_reason"))
    if choice.get("error") or finish == "error":
        return failure(f"an error in the choice: {_error_message(choice)}")
    message = _dict(choice.get("message"))
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    parts = [{"type": "reasoning", "text": reasoning}, {"text": message.get("content")}]
    thoughts, answer = split_thoughts(_flatten(parts))
    reply = replace(reply, thoughts=thoughts, finish=finish)
    if not answer or not answer.strip():
        # A retry would be billed again and most likely end the same way.
        hint = "; raise max_tokens" if finish == "length" else ""
        error = f"empty answer, finish_reason {finish!r}{hint}"
        return _Attempt(replace(reply, error=error, final=True), cost=cost)
    return _Attempt(replace(reply, answer=answer), cost=cost)


def _flatten(content: Any) -> str:
    """Return the text of content, which may be a list of parts; thoughts stand between markers."""
    if not isinstance(content, list):
        return _text(content) or ""
    texts = []
    for part in map(_dict, content):
        text = _flatten(part.get("thinking") or part.get("reasoning") or part.get("text"))
        is_thought = part.get("type") in ("thinking", "reasoning")
        texts.append(f"<think>{text}</think>" if text and is_thought else text)
    return "".join(texts)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e12 else None


def missing_key(endpoint: Endpoint) -> str | None:
    """Return what to tell the user if the API key is not set.

    Raises:
        SetupError: the key contains invalid characters.
    """
    key = os.environ.get(API_KEY_VARIABLE, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise SetupError(f"{API_KEY_VARIABLE} contains invalid characters; set it again")
    if key:
        return None
    return f"{API_KEY_VARIABLE} is not set: {endpoint.path} ({endpoint.model}) will be skipped"
