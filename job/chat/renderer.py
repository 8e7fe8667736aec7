"""Rendering: messages to the text that a model reads, with what trains it.

Templates are run as transformers runs them: in Jinja's immutable sandbox, with the special tokens
of the tokenizer and the same helpers. No text of a message acts as markup: special tokens of the
tokenizer written inside it are broken by a space.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from job.chat.conversation import Conversation, MarkedText, Message
from job.chat.templates import ChatTemplate
from job.chat.text_tokenizer import TextTokenizer
from job.chat.thoughts import marks_thoughts
from job.errors import UsageError

_TODAY = datetime(2024, 7, 26)
"""What templates get as today's date, so that a run that is resumed renders the same prompts."""

PROBE_SECONDS = 10.0
"""Time a template may take to render one probe."""

_MARKUP = r"[<\[]\S+[>\]]"
"""The form of tokens that are markup where the template writes them, such as <tool_call>."""

_PLACE = "\ue000"
"""A character for private use, to find the place of a reply."""

_BEGIN, _END = "\ufdd0", "\ufdd1"
"""Unicode noncharacters around what a template marks as generated."""


class UnrenderableError(Exception):
    """A conversation that a chat template cannot render; the message is the reason."""


class ChatRenderer:
    """A chat template with the special tokens of a tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: TextTokenizer) -> None:
        """Compile a template and find out what it can do.

        Raises:
            UsageError: it cannot render a conversation.
        """
        self.template = template
        self._control = self._of_replies = _pattern(tokenizer.special_ids)
        self._variables: dict[str, Any] = {**tokenizer.named, **template.kwargs}
        try:
            self._compiled = _environment().from_string(template.text)
            self.end_token = self._probe(tokenizer)
        except (TemplateError, UnrenderableError) as error:
            raise UsageError(
                f"model.chat_template: the template ({template.source}) cannot render a "
                f"conversation: {error}"
            ) from error

    def _probe(self, tokenizer: TextTokenizer) -> str:
        """Find the control tokens, special or not, and return the one that ends a reply."""
        question, reply = Message("user", _PLACE), Message("assistant", _PLACE)
        with _time_limit():
            prompt = self._apply([question], add_generation_prompt=True)
            text = self._apply([question, reply])
        if _PLACE not in prompt or text.count(_PLACE) < 2:
            raise UnrenderableError("it leaves out what the messages say")
        added = _pattern(token for token in tokenizer.added_ids if token.strip())
        rendered = {*added.findall(prompt), *added.findall(text)}
        self.control_tokens = {*tokenizer.special_ids, *rendered}
        literals = {t for t in added.findall(self.template.text) if re.fullmatch(_MARKUP, t)}
        self._control = _pattern(self.control_tokens | literals)
        # What a model writes may hold its own marks of thoughts.
        self._of_replies = _pattern(t for t in self.control_tokens if not marks_thoughts(t))
        ends = self._of_replies.findall(text.rpartition(_PLACE)[2])
        if not ends:
            raise UnrenderableError("no special token ends the model's reply; write one after it")
        return str(ends[0])

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template renders a system message."""
        turns = [Message("system", _PLACE), Message("user", "question")]
        try:
            return _PLACE in self._apply(turns, add_generation_prompt=True)
        except UnrenderableError:
            return False

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template renders definitions of tools, their calls and their results."""
        function = {"name": "toolname", "description": "", "parameters": {"type": "object"}}
        called = {"name": "toolname", "arguments": {"key": _PLACE}}
        call = {"id": "a1b2c3d4e", "type": "function", "function": called}
        result = {"name": "toolname", "tool_call_id": call["id"]}
        turns = [
            Message("user", "question"),
            Message("assistant", "", extra=json.dumps({"tool_calls": [call]})),
            Message("tool", "outcome", extra=json.dumps(result)),
        ]
        try:
            text = self._apply(turns, [{"type": "function", "function": function}])
        except UnrenderableError:
            return False
        return text.count("toolname") >= 2 and _PLACE in text and "outcome" in text

    def unrenderable(self, messages: Conversation) -> str | None:
        """Return why a conversation cannot be rendered for training; None if it can be."""
        try:
            self.training_texts(messages)
        except UnrenderableError as reason:
            return str(reason)
        return None

    def neutralize(self, text: str, *, of_reply: bool = False) -> str:
        """Return a text with every control token broken by a space; replies keep thoughts."""
        pattern = self._of_replies if of_reply else self._control
        while True:
            broken = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            if broken == text:
                return text
            text = broken  # breaking one token may expose another, like <|[INST]|>

    def prompt(self, messages: Conversation) -> str:
        """Return the text of a conversation in which it is the model's turn.

        Raises:
            UnrenderableError: the template cannot render it.
        """
        return _unmarked(self._render(messages, add_generation_prompt=True)).text

    def training_texts(self, messages: Conversation) -> list[MarkedText]:
        """Return the texts that train a conversation's replies as the model would write them.

        It is one text, unless the template rewrites earlier turns (Qwen 3 leaves out their
        thoughts): a reply that would read differently later gets a text that ends with it.

        Raises:
            UnrenderableError: the template cannot render it, or not as a continuation of the
                prompt for the reply.
        """
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        trained = [i for i in replies if messages[i].weight]
        complete = _unmarked(self._render(messages))
        if len(complete.replies) == len(replies) and replies:  # the template says what they are
            marked = zip(replies, complete.replies, strict=True)
            spans = tuple(span for i, span in marked if messages[i].weight)
            return [MarkedText(complete.text, spans)]
        texts: list[MarkedText] = []
        together: list[tuple[int, int]] = []
        for i in trained:
            prompt, turns = self.prompt(messages[:i]), messages[: i + 1]
            is_last = len(turns) == len(messages)
            text = self.reply_text(turns, complete.text if is_last else "")
            if complete.text.startswith(text):
                together.append((len(prompt), len(text)))
            else:
                texts.append(MarkedText(text, ((len(prompt), len(text)),)))
        return [*texts, MarkedText(complete.text, tuple(together))] if together else texts

    def reply_text(self, turns: Conversation, rendered: str = "") -> str:
        """Return the prompt for the last turn, a reply, with the reply and the end of its turn.

        Raises:
            UnrenderableError: see `training_texts`.
        """
        prompt = self.prompt(turns[:-1])
        text = rendered or _unmarked(self._render(turns)).text
        if not text.startswith(prompt):
            text = self._continue(prompt, text, turns)
        end = text.rfind(self.end_token) + len(self.end_token)
        if end <= len(prompt):
            raise UnrenderableError("reply without an end of turn")
        return text[:end]

    def _continue(self, prompt: str, text: str, turns: Conversation) -> str:
        """Put the reply at the end of `text` after a prompt that begins it with empty thoughts.

        Gemma 4 without thinking is prompted with them, but conversations are rendered without.
        """
        marked = self._render([*turns[:-1], Message("assistant", _PLACE)])
        before, found, _ = marked.partition(_PLACE)
        opening = prompt.removeprefix(before)
        is_closed = sum(map(marks_thoughts, self._control.findall(opening))) > 1
        if not (found and is_closed and prompt.startswith(before) and text.startswith(before)):
            raise UnrenderableError("reply not rendered as a continuation of its prompt")
        return prompt + text[len(before) :]

    def _render(self, messages: Conversation, *, add_generation_prompt: bool = False) -> str:
        tools = [m.content for m in messages if m.role == "tools"]
        turns = [m for m in messages if m.role != "tools"]
        uses_tools = tools or any(m.role == "tool" or '"tool_calls"' in m.extra for m in turns)
        if uses_tools and not self.knows_tools:
            raise UnrenderableError("tools, which the chat template does not know")
        if turns and turns[0].role == "system" and not self.has_system_role:
            turns = _into_first_turn(turns)
        definitions = json.loads(tools[0]) if tools else None
        return self._apply(turns, definitions, add_generation_prompt=add_generation_prompt)

    def _apply(
        self, turns: Conversation, tools: Any = None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._compiled.render(
                messages=[
                    self._clean(_mapping(turn), of_reply=turn.role == "assistant") for turn in turns
                ],
                tools=self._clean(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template may fail in any way that Python can
            reason = str(error) or type(error).__name__
            raise UnrenderableError(f"the chat template says: {reason}") from error

    def _clean(self, value: Any, *, of_reply: bool = False) -> Any:
        """Return a JSON value whose texts have no control token."""
        if isinstance(value, str):
            text = value.replace(_BEGIN, "").replace(_END, "")
            return self.neutralize(text, of_reply=of_reply)
        if isinstance(value, dict):
            return {key: self._clean(item, of_reply=of_reply) for key, item in value.items()}
        if isinstance(value, list):
            return [self._clean(item, of_reply=of_reply) for item in value]
        return value


def _mapping(message: Message) -> dict[str, Any]:
    further = json.loads(message.extra) if message.extra else {}
    if "reasoning_content" in further:  # gpt-oss reads it by another name
        further["thinking"] = further["reasoning_content"]
    return {"role": message.role, "content": message.content, **further}


def _into_first_turn(turns: Sequence[Message]) -> list[Message]:
    """Put the instruction at the beginning of the user's first turn."""
    system, first, *others = turns
    text = "\n\n".join(part for part in (system.content.strip(), first.content) if part)
    return [replace(first, content=text), *others]


def _unmarked(text: str) -> MarkedText:
    """Return a rendered text without the marks of what is generated, and where they were."""
    spans: list[tuple[int, int]] = []
    plain = ""
    for part in text.split(_BEGIN):
        reply, marked, rest = part.partition(_END)
        if marked:
            spans.append((len(plain), len(plain) + len(reply)))
        plain += reply + rest
    return MarkedText(plain, tuple(spans))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of tokens, longest first."""
    tokens = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


class _Generation(ext.Extension):
    """The tag `{% generation %}`, around what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Read a block up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @staticmethod
    def mark(caller: Callable[[], str]) -> str:
        """Return the text of a block between marks."""
        return f"{_BEGIN}{caller()}{_END}"


class _Namespace(Namespace):
    """Jinja's namespace without underscored names, which would reach into Python."""

    def __setitem__(self, name: str, value: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name!r} is unsafe")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _TODAY.strftime
    environment.globals["dict"] = lambda *items, **named: dict(*items, **named)
    environment.globals["namespace"] = _Namespace
    return environment


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise UnrenderableError in the block after `PROBE_SECONDS`, whichever thread it is in."""
    deadline = time.monotonic() + PROBE_SECONDS

    def check(_frame: object, _event: str, _argument: object) -> Any:
        if time.monotonic() > deadline:
            raise UnrenderableError(f"it takes longer than {PROBE_SECONDS:.0f} s")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
