"""Whatever a chat API does, only answers count as answers, and the key stays secret."""

import io
import itertools
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.chat.conversation import Message
from job.evals.api_client import ChatClient, Reply
from job.evals.budget import Budget
from job.runtime import logs
from job.spec.remote import Reference
from tests.conversations import turns
from tests.services.endless import endless_server
from tests.services.faults import Spoil
from tests.services.openrouter import PRICE, ROUTE, SUPPORTED, Misbehaviour, OpenRouter

KEY = "sk-or-v1-" + "0123456789abcdef" * 4
ATTEMPTS = 3
Client = Callable[..., ChatClient]


@pytest.fixture
def service() -> Iterator[OpenRouter]:
    with OpenRouter(
        answer=lambda chat: chat["messages"][-1]["content"].upper(), key=KEY
    ) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    """The seconds of each wait of the client."""
    return []


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    stream = io.StringIO()
    logs.configure(stream=stream)
    yield stream
    structlog.reset_defaults()


@pytest.fixture
def client(service: OpenRouter, waits: list[float], log: io.StringIO) -> ChatClient:
    return client_of(service, waits)


def client_of(
    service: OpenRouter, waits: list[float], key: str = KEY, **section: Any
) -> ChatClient:
    fields = {
        "model": "org/model",
        "base_url": service.url + "/api/v1/",
        "max_tokens": 64,
        "timeout_seconds": 5,
        "attempts": ATTEMPTS,
        "reasoning": None,
    }
    return ChatClient(Reference.model_validate(fields | section), key, sleep=waits.append)


def test_an_answer_has_its_cost(client: ChatClient, service: OpenRouter) -> None:
    assert client.complete(turns("two words")) == Reply(
        "TWO WORDS",
        provider="Stand-in",
        model="org/model",
        finish="stop",
        prompt_tokens=2,
        completion_tokens=2,
        cost_usd=4 * PRICE,
    )
    (chat,) = service.chats
    assert (chat["model"], chat["temperature"], chat["max_tokens"]) == ("org/model", 0, 64)
    assert chat["messages"] == [{"role": "user", "content": "two words"}]


def test_tools_are_sent_as_openai_has_them(service: OpenRouter, waits: list[float]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
    named = {"id": "call_x", **call}
    client = client_of(service, waits, api="openrouter")
    reply = client.complete(
        [
            Message("tools", json.dumps([tool])),
            Message("system", "be brief"),
            Message("user", "look"),
            Message("assistant", "", extra=json.dumps({"tool_calls": [call, call]})),
            Message("tool", "1", extra=json.dumps({"name": "f"})),
            Message("tool", "2"),
            Message("assistant", "b", weight=0, extra=json.dumps({"reasoning_content": "hm"})),
            Message("assistant", "", extra=json.dumps({"tool_calls": [named]})),
            Message("tool", "3", extra=json.dumps({"tool_call_id": "call_x"})),
            Message("user", "so"),
        ]
    )
    assert reply.answer == "SO"
    (chat,) = service.chats
    assert chat["tools"] == [tool]
    sent = {"type": "function", "function": {"name": "f", "arguments": '{"x": "\\u00e9"}'}}
    assert chat["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", **sent}, {"id": "call_2", **sent}],
        },
        {"role": "tool", "content": "1", "name": "f", "tool_call_id": "call_1"},
        {"role": "tool", "content": "2", "tool_call_id": "call_2"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_x", **sent}]},
        {"role": "tool", "content": "3", "tool_call_id": "call_x"},
        {"role": "user", "content": "so"},
    ]


def test_credentials_of_netrc_do_not_replace_the_key(
    client: ChatClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password hunter2")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert client.complete(turns("hello")).answer == "HELLO"


@pytest.mark.parametrize("status", [302, 307, 308])
def test_neither_key_nor_prompt_goes_to_another_host(
    status: int, client: ChatClient, service: OpenRouter
) -> None:
    elsewhere = service.url.replace("127.0.0.1", "localhost") + ROUTE
    service.faults.add(ROUTE, status=status, headers={"Location": elsewhere})
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.final) == (None, True)
    assert "it redirects to http://localhost" in (reply.error or "")
    assert len(service.requests) == 1


def test_openrouter_requests_require_every_parameter(
    service: OpenRouter, waits: list[float], log: io.StringIO
) -> None:
    client = client_of(service, waits, api="openrouter", reasoning="none")
    assert client.complete(turns("hello")).answer == "HELLO"
    client_of(service, waits, api="openrouter").complete(turns("hello"), max_tokens=7)
    first, second = service.chats
    assert first["provider"] == second["provider"] == {"require_parameters": True}
    assert (first["reasoning"], "reasoning" in second) == ({"effort": "none"}, False)
    assert (first["max_tokens"], second["max_tokens"]) == (64, 7)


@pytest.mark.parametrize(("max_usd", "answer"), [(1e-3, "HELLO"), (1e-5, None)])
def test_not_even_the_first_request_can_pass_the_budget(
    max_usd: float, answer: str | None, service: OpenRouter, waits: list[float], log: io.StringIO
) -> None:
    client = client_of(service, waits, api="openrouter")
    client.budget = Budget(max_usd)
    reply = client.complete(turns("hello"))
    assert reply.answer == answer
    assert service.billed <= max_usd
    if answer is None:
        assert "no provider may be cheap enough for reference.max_usd" in (reply.error or "")


@pytest.mark.parametrize(("effort", "sent"), [(None, None), ("none", None), ("high", "high")])
def test_other_apis_get_only_standard_parameters(
    effort: str | None,
    sent: str | None,
    service: OpenRouter,
    waits: list[float],
    log: io.StringIO,
) -> None:
    client_of(service, waits, reasoning=effort).complete(turns("hello"))
    (chat,) = service.chats
    assert set(chat) - {"reasoning_effort"} == {"model", "messages", "temperature", "max_tokens"}
    assert chat.get("reasoning_effort") == sent


def test_unsupported_reasoning_is_reported_once_with_a_hint(
    service: OpenRouter, waits: list[float], log: io.StringIO
) -> None:
    client = client_of(service, waits, api="openrouter", reasoning="none")
    service.supported = SUPPORTED - {"reasoning"}
    reply = client.complete(turns("hello"))
    assert reply.error is not None
    assert "HTTP 404: No endpoints found" in reply.error
    assert "set reference.reasoning to null" in reply.error
    assert not client.complete(turns("again")).sent
    assert len(service.requests) == 1


def test_failed_attempts_cost_too(client: ChatClient, service: OpenRouter) -> None:
    service.script.extend(["choice_error", "finish_error"])
    reply = client.complete(turns("hello there"))
    assert reply.answer == "HELLO THERE"
    assert (reply.prompt_tokens, reply.completion_tokens) == (6, 2)
    assert reply.cost_usd == pytest.approx(8 * PRICE) == pytest.approx(service.billed)
    service.misbehave = lambda chat: "no_choices"
    assert client.complete(turns("hello there")).cost_usd == pytest.approx(2 * ATTEMPTS * PRICE)


@pytest.mark.parametrize(("spoil", "lost"), [("cut", 1), ("stall", 1), (None, 0)])
def test_a_lost_reply_is_counted_as_possibly_billed(
    spoil: Spoil | None,
    lost: int,
    service: OpenRouter,
    waits: list[float],
    log: io.StringIO,
) -> None:
    client = client_of(service, waits, timeout_seconds=0.5)
    if spoil is not None:
        service.faults.add("POST", spoil=spoil)
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.lost) == ("HELLO", lost)
    assert service.billed - reply.cost_usd == pytest.approx(lost * reply.cost_usd)


def test_an_unreachable_host_bills_nothing(log: io.StringIO, waits: list[float]) -> None:
    with OpenRouter(key=KEY) as gone:
        client = client_of(gone, waits)
    assert client.complete(turns("hello")).lost == 0


def test_text_that_utf8_cannot_encode_is_replaced(client: ChatClient, service: OpenRouter) -> None:
    service.answer = lambda chat: "a \ud800 b \u0000"
    assert client.complete(turns("hello")).answer == "a ? b \u0000"


def test_the_system_message_is_sent_first(client: ChatClient, service: OpenRouter) -> None:
    client.complete(turns("a", system="Be brief."))
    client.complete(turns("a"))
    assert [[message["role"] for message in chat["messages"]] for chat in service.chats] == [
        ["system", "user"],
        ["user"],
    ]


@pytest.mark.parametrize(
    "name", ["error", "choice_error", "finish_error", "no_choices", "429", "502", "cut"]
)
def test_a_failure_is_retried_until_answered(
    name: Misbehaviour, client: ChatClient, service: OpenRouter, waits: list[float]
) -> None:
    service.script.extend([name] * (ATTEMPTS - 1))
    assert client.complete(turns("hello")).answer == "HELLO"
    assert len(service.chats) == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("error", "an error with status 200: Provider returned error"),
        ("choice_error", "an error in the choice: Provider returned error"),
        ("finish_error", "an error in the choice"),
        ("no_choices", "no choices"),
        ("429", "HTTP 429"),
        ("502", "HTTP 502"),
        ("cut", "ChunkedEncodingError"),
    ],
)
def test_a_lasting_failure_is_retried_a_limited_number_of_times(
    name: Misbehaviour, reason: str, client: ChatClient, service: OpenRouter, waits: list[float]
) -> None:
    service.misbehave = lambda chat: name
    reply = client.complete(turns("hello"))
    assert reply.answer is None
    assert reply.error is not None
    assert reply.error.startswith(reason)
    assert reply.error.endswith(f"(tried {ATTEMPTS} times)")
    assert len(service.chats) == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1


def test_an_answer_used_up_by_reasoning_is_not_retried(
    client: ChatClient, service: OpenRouter
) -> None:
    service.script.append("length")
    reply = client.complete(turns("hello there"))
    assert reply.answer is None
    assert reply.error == "empty answer, finish_reason 'length'; raise max_tokens"
    assert (reply.prompt_tokens, reply.completion_tokens, reply.reasoning_tokens) == (2, 64, 64)
    assert reply.cost_usd == 66 * PRICE
    assert len(service.chats) == 1


def say(service: OpenRouter, finish: str = "stop", **message: Any) -> None:
    """Let the service reply with this message."""
    body = {"choices": [{"message": message, "finish_reason": finish}]}
    service.faults.add("POST", status=200, body=json.dumps(body).encode())


TEXT = {"type": "text", "text": "B"}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "<think>Is it C?</think>\n\nB"},
        {"content": "Is it C?</think>B"},
        {"content": "B", "reasoning": "Is it C?"},
        {"content": "B", "reasoning_content": "Is it C?", "reasoning": "Is it C?"},
        {"content": [{"type": "thinking", "thinking": "Is it C?"}, TEXT]},
        {"content": [{"type": "thinking", "thinking": [{"text": "Is it C?"}]}, TEXT]},
        {"content": [{"type": "reasoning", "text": "Is it C?"}, TEXT]},
        {"content": [{"type": "reasoning", "reasoning": "Is it C?"}, TEXT, {"type": []}, None]},
    ],
)
def test_thoughts_come_off_in_whichever_form_they_are_sent(
    message: dict[str, Any], client: ChatClient, service: OpenRouter
) -> None:
    say(service, **message)
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.thoughts, reply.error) == ("B", "Is it C?", None)


def test_parts_of_text_are_one_answer(client: ChatClient, service: OpenRouter) -> None:
    say(service, content=[{"type": "text", "text": "It is "}, TEXT])
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.thoughts) == ("It is B", "")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "<think>The answer is C"},
        {"content": [{"type": "thinking", "thinking": "The answer is C"}]},
        {"content": None, "reasoning": "The answer is C"},
    ],
)
def test_an_answer_cut_in_its_thoughts_is_missing(
    message: dict[str, Any], client: ChatClient, service: OpenRouter
) -> None:
    say(service, "length", **message)
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.thoughts, reply.final) == (None, "The answer is C", True)
    assert reply.error == "empty answer, finish_reason 'length'; raise max_tokens"


@pytest.mark.parametrize("answer", ["", "  \n\t"])
def test_an_empty_answer_is_none(answer: str, client: ChatClient, service: OpenRouter) -> None:
    service.answer = lambda chat: answer
    assert client.complete(turns("hello")).answer is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad gateway</html>",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"B"',
        b"{}",
        b'{"choices": null}',
        b'{"choices": [{}]}',
        b'{"choices": [{"text": "B"}]}',
        b'{"choices": [null]}',
        b'{"choices": {"0": "B"}}',
        b'{"choices": [{"message": "B"}]}',
        b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"choices": [{"message": {"content": ["B"]}}]}',
        b'{"error": "overloaded", "choices": [{"message": {"content": "B"}}]}',
        b'{"choices": [{"error": {"code": 502}, "message": {"content": "B"}}]}',
    ],
)
def test_a_200_of_another_shape_is_no_answer(
    body: bytes, client: ChatClient, service: OpenRouter
) -> None:
    service.faults.add("POST", status=200, body=body, times=ATTEMPTS)
    reply = client.complete(turns("hello"))
    assert reply.answer is None
    assert reply.error
    assert 1 <= len(service.requests) <= ATTEMPTS


_KEYS = ("choices", "message", "content", "error", "usage", "cost", "finish_reason", "text", "type")
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(body=_JSON.map(json.dumps) | st.text(), status=st.sampled_from([200, 200, 400, 404]))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_reply_is_an_answer_or_the_reason_there_is_none(
    body: str, status: int, service: OpenRouter, waits: list[float], log: io.StringIO
) -> None:
    service.faults.clear()
    service.faults.add("POST", status=status, body=body.encode("utf-8", "replace"), times=ATTEMPTS)
    reply = client_of(service, waits).complete(turns("hello"))
    assert (reply.answer is None) == (reply.error is not None)
    assert math.isfinite(reply.cost_usd)
    assert "Traceback" not in (reply.error or "")


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_an_invalid_request_is_not_retried(
    status: int, client: ChatClient, service: OpenRouter
) -> None:
    body = json.dumps({"error": {"message": "No such model"}}).encode()
    service.faults.add("POST", status=status, body=body)
    reply = client.complete(turns("hello"))
    assert reply == Reply(None, error=f"HTTP {status}: No such model", final=True)
    assert len(service.requests) == 1


def test_a_model_that_wants_the_newer_limit_gets_it(
    client: ChatClient, service: OpenRouter
) -> None:
    refusal = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    body = json.dumps({"error": {"message": refusal}}).encode()
    service.faults.add("POST", status=400, body=body)
    assert client.complete(turns("hello"), 7).answer == "HELLO"
    assert client.complete(turns("again"), 7).answer == "AGAIN"
    limits = [{k: v for k, v in chat.items() if "max_" in k} for chat in service.chats]
    assert limits == [{"max_completion_tokens": 7}] * 2
    assert len(service.requests) == 3


def test_an_endpoint_that_only_streams_is_refused_in_words(
    client: ChatClient, service: OpenRouter
) -> None:
    service.faults.add("POST", status=200, body=b'data: {"choices": []}\n\ndata: [DONE]\n')
    assert "sends a stream" in (client.complete(turns("hello")).error or "")
    assert not client.complete(turns("again")).sent
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_an_outage_is_retried(status: int, client: ChatClient, service: OpenRouter) -> None:
    service.faults.add("POST", status=status)
    assert client.complete(turns("hello")).answer == "HELLO"


def test_an_unreachable_host_is_no_answer(log: io.StringIO, waits: list[float]) -> None:
    with OpenRouter(key=KEY) as gone:
        client = client_of(gone, waits)
    reply = client.complete(turns("hello"))
    assert (reply.answer, reply.error) == (None, f"ConnectionError (tried {ATTEMPTS} times)")


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("2.5", 2.5, 2.5),
        ("9999", 60, 60),
        ("0", 0.5, 1),
        ("-3", 0.5, 1),
        ("soon", 0.5, 1),
    ],
)
def test_the_wait_a_server_requests_is_at_most_a_minute(
    header: str,
    low: float,
    high: float,
    client: ChatClient,
    service: OpenRouter,
    waits: list[float],
) -> None:
    service.retry_after = header
    service.script.append("429")
    assert client.complete(turns("hello")).answer == "HELLO"
    assert len(waits) == 1
    assert low <= waits[0] <= high


def test_waits_grow_up_to_a_minute(
    service: OpenRouter, waits: list[float], log: io.StringIO
) -> None:
    service.misbehave = lambda chat: "502"
    client = client_of(service, waits, attempts=12)
    assert client.complete(turns("hello")).answer is None
    assert len(waits) == len(set(waits)) == 11
    for number, seconds in enumerate(waits):
        assert min(60, 2**number) * 0.5 <= seconds <= min(60, 2**number)
    assert all(before < after * 2 for before, after in itertools.pairwise(waits))


def test_after_a_refused_key_nothing_more_is_sent(service: OpenRouter, waits: list[float]) -> None:
    client = client_of(service, waits, key="sk-or-v1-stranger-0123456789")
    first, second = client.complete(turns("hello")), client.complete(turns("again"))
    assert first == Reply(None, error="HTTP 401: the API key in OPENROUTER_API_KEY was rejected")
    assert second == Reply(
        None, error="HTTP 401: the API key in OPENROUTER_API_KEY was rejected", sent=False
    )
    assert (len(service.requests), waits) == (1, [])


def test_without_credit_nothing_more_is_sent(
    client: ChatClient, service: OpenRouter, waits: list[float]
) -> None:
    service.script.append("402")
    assert client.complete(turns("hello")).error == "HTTP 402: the account is out of credit"
    assert not client.complete(turns("again")).sent
    assert (len(service.chats), waits) == (1, [])


def test_an_error_page_that_is_not_json_is_reported(
    client: ChatClient, service: OpenRouter, waits: list[float]
) -> None:
    service.faults.add("POST", status=404, body=b"<html>not here</html>")
    reply = client.complete(turns("hello"))
    assert (reply.error, reply.final) == ("HTTP 404: <html>not here</html>", True)
    assert waits == []


def test_the_key_is_in_the_header_and_nowhere_else(
    client: ChatClient, service: OpenRouter, log: io.StringIO
) -> None:
    texts = [repr(client)]
    service.script.extend(["error", "cut", "429", "choice_error", "finish_error", "no_choices"])
    texts += [repr(client.complete(turns("hello"))) for _ in range(2)]
    service.script.extend(["502"] * ATTEMPTS)
    texts.append(repr(client.complete(turns("hello"))))
    for status in (403, 400, 401):
        body = json.dumps({"error": {"message": f"the key {KEY} is refused"}}).encode()
        service.faults.add("POST", status=status, body=body)
        texts.append(repr(client.complete(turns("hello"))))
    assert service.requests[0].bearer == KEY
    assert KEY not in "".join(texts)
    assert KEY not in json.dumps(service.chats)
    assert KEY not in "".join(str(request) for request in service.requests)
    assert log.getvalue().count("retrying request") >= 6
    assert KEY not in log.getvalue()


def test_a_key_that_an_endpoint_repeats_is_not_logged(
    client: ChatClient, service: OpenRouter, log: io.StringIO
) -> None:
    body = json.dumps({"error": {"message": f"who is {KEY}?"}}).encode()
    service.faults.add("POST", status=200, body=body)
    assert client.complete(turns("hello")).answer == "HELLO"
    assert "who is [redacted]?" in log.getvalue()


def test_the_base_url_may_end_with_a_slash(service: OpenRouter, waits: list[float]) -> None:
    for url in (service.url + "/api/v1", service.url + "/api/v1/"):
        client_of(service, waits, base_url=url).complete(turns("hello"))
    assert [request.route for request in service.requests] == [ROUTE, ROUTE]


def test_a_key_that_an_endpoint_repeats_is_redacted_in_replies(
    client: ChatClient, service: OpenRouter
) -> None:
    body = ('{"error": {"message": "bad key ' + KEY + '"}}').encode()
    service.faults.add("POST", status=200, body=body, times=ATTEMPTS)
    service.faults.add("POST", status=400, body=body)
    service.answer = lambda chat: f"your key is {KEY}"
    for _ in range(2):
        error = client.complete(turns("hello")).error
        assert error is not None
        assert "[redacted]" in error
        assert KEY not in error
    assert client.complete(turns("hello")).answer == "your key is [redacted]"


@pytest.mark.parametrize(
    ("path", "error"), [("gzip", "ReplyTooLargeError"), ("drip", "ReadTimeout")]
)
def test_a_reply_without_an_end_is_given_up(path: str, error: str, waits: list[float]) -> None:
    with endless_server() as url:
        section = Reference(
            model="m", base_url=f"{url}/{path}", attempts=1,
            timeout_seconds=0.5 if path == "drip" else 20,
        )  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply = ChatClient(section, KEY, sleep=waits.append).complete(turns("hello"))
    assert (reply.answer, reply.lost) == (None, 1)
    assert error in (reply.error or "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
