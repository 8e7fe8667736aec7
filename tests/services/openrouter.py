"""A stand-in for OpenRouter: chat completions in the OpenAI form, with its odd failures.

`answer` computes the text from the request, so a test decides what the model says. What makes
the real service hard to use is scripted by name: an error inside a 200, no choices, an answer
cut off by its length, a rate limit, no credit, a lost connection.

Parameters that no provider supports are ignored, or refused with a 404 where the request says
`provider.require_parameters`. Left out: streaming (refused with a 400), calls of tools, images,
the list of models, other provider routing and real tokenization (a token is a word here).
"""

import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from tests.services.base import Reply, Request, Service, json_reply

ROUTE = "/api/v1/chat/completions"
PRICE = 1e-6
SUPPORTED = frozenset(
    {"model", "messages", "provider", "temperature", "max_tokens", "reasoning", "tools"}
)
Chat = dict[str, Any]
Misbehaviour = Literal[
    "ok",  # no misbehaviour: the answer as it should be
    "error",  # 200 with a top-level error in place of the choices
    "choice_error",  # 200 with an error inside the first choice
    "finish_error",  # 200 with a first choice whose finish_reason is "error"
    "no_choices",  # 200 with an empty list of choices
    "length",  # 200 with no content and the finish_reason "length": all was spent on reasoning
    "no_cost",  # an answer whose usage does not say what it cost
    "dear",  # an answer that cost a thousand times more
    "402",  # no credit
    "429",  # rate limit, with Retry-After
    "502",  # the provider is down
    "cut",  # the connection closes in the middle of the body
]


class OpenRouter(Service):
    """The chat service.

    `script` holds the misbehaviours of the next requests, one each; once it is empty,
    `misbehave` names that of a request from its content, if it is set. `chats` are the bodies
    of the requests that carried the right key, in order of arrival; `billed` is what was charged
    for them, whether or not the reply arrived.
    """

    def __init__(
        self,
        answer: Callable[[Chat], str] = lambda chat: "ok",
        key: str = "sk-or-stand-in",
        retry_after: str = "0",
    ) -> None:
        super().__init__()
        self.answer = answer
        self.key = key
        self.retry_after = retry_after
        self.script: deque[Misbehaviour] = deque()
        self.misbehave: Callable[[Chat], Misbehaviour] | None = None
        self.chats: list[Chat] = []
        self.billed = 0.0
        self.supported = SUPPORTED
        self._turn = threading.Lock()

    def respond(self, request: Request, body: bytes) -> Reply:
        """Answer a chat, or misbehave."""
        if request.route != ROUTE or request.method != "POST":
            return _error(404, "Not Found")
        if request.bearer is None:
            return _error(401, "No auth credentials found")
        if request.bearer != self.key:
            return _error(401, "User not found.")
        try:
            chat: Chat = json.loads(body)
        except ValueError:
            return _error(400, "Invalid JSON")
        if not chat.get("model") or not chat.get("messages"):
            return _error(400, "Input required: specify model and messages")
        if chat.get("stream"):
            return _error(400, "the stand-in does not stream")
        number, name = self._next(chat)
        provider = chat.get("provider") or {}
        if any(price < PRICE * 1e6 for price in provider.get("max_price", {}).values()):
            return _error(404, "No endpoints found within the requested price.")
        required = provider.get("require_parameters")
        if required and not self.supported.issuperset(chat):
            return _error(404, "No endpoints found that can handle the requested parameters.")
        reply = self._reply(name, chat, f"gen-{number}")
        with self._turn:
            self.billed += (json.loads(reply.body).get("usage") or {}).get("cost", 0.0)
        return reply

    def _next(self, chat: Chat) -> tuple[int, Misbehaviour]:
        """Log the chat; give its number and how it is to be treated."""
        with self._turn:
            self.chats.append(chat)
            number = len(self.chats)
            if self.script:
                return number, self.script.popleft()
        return number, self.misbehave(chat) if self.misbehave else "ok"

    def _reply(self, name: Misbehaviour, chat: Chat, chat_id: str) -> Reply:
        failure = {"code": 502, "message": "Provider returned error", "metadata": {}}
        match name:
            case "ok":
                return json_reply(_completion(chat, chat_id, self.answer(chat)))
            case "no_cost":
                reply = _completion(chat, chat_id, self.answer(chat))
                del reply["usage"]["cost"]
                return json_reply(reply)
            case "dear":
                reply = _completion(chat, chat_id, self.answer(chat))
                reply["usage"]["cost"] *= 1000
                return json_reply(reply)
            case "cut":
                complete = json_reply(_completion(chat, chat_id, self.answer(chat)))
                return replace(complete, cut_after=len(complete.body) // 2)
            case "error":
                return json_reply({"error": failure, "user_id": "user_stand_in"})
            case "choice_error":
                return json_reply(_completion(chat, chat_id, "", "error", error=failure))
            case "finish_error":
                return json_reply(_completion(chat, chat_id, "", "error"))
            case "no_choices":
                return json_reply(_completion(chat, chat_id, "") | {"choices": []})
            case "length":
                spent = _completion(chat, chat_id, "", "length")
                spent["usage"] = _usage(_words(chat), *[chat.get("max_tokens", 0)] * 2)
                return json_reply(spent)
            case "402":
                return _error(402, "Insufficient credits")
            case "429":
                limited = _error(429, "Rate limit exceeded")
                return replace(
                    limited, headers={**limited.headers, "Retry-After": self.retry_after}
                )
            case "502":
                return _error(502, "Provider returned error")
        raise ValueError(f"{name!r} is none of {get_args(Misbehaviour)}")


def _error(status: int, message: str) -> Reply:
    return json_reply({"error": {"code": status, "message": message}}, status)


def _words(chat: Chat) -> int:
    return sum(len(str(message.get("content", "")).split()) for message in chat["messages"])


def _completion(
    chat: Chat, chat_id: str, content: str, finish_reason: str = "stop", **choice: Any
) -> dict[str, Any]:
    """A chat completion with one choice; `choice` adds to that choice."""
    return {
        "id": chat_id,
        "object": "chat.completion",
        "created": 1735689600,
        "model": chat["model"],
        "provider": "Stand-in",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": finish_reason,
                "native_finish_reason": finish_reason,
                **choice,
            }
        ],
        "usage": _usage(_words(chat), len(content.split())),
    }


def _usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    total_tokens = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total_tokens,
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "cost": total_tokens * PRICE,
    }
