"""Chat templates: how messages are rendered for a model, with no text acting as markup.

Text of users and answers is neutralized before it is wrapped: a control token written inside
it (`<end_of_turn>` in a patient's message) is broken by a space, so that it cannot end a turn
or begin another. The templates follow the models' own documentation.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from job.chat.conversation import Conversation

CONTROL_PATTERN = (
    r"<(?:bos|eos|pad|unk|mask|s|/s|start_of_turn|end_of_turn|start_of_image|end_of_image|"
    r"image_soft_token|img|unused\d+|end_of_utterance)>"
    r"|<\|[^<>|\s]{1,40}\|?>|<[^<>|\s]{1,40}\|>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|multimodal)\]"
    r"|<</?SYS>>"
)
"""The control tokens of the known chat formats, as a regular expression (of Python and RE2)."""

_CONTROL = re.compile(CONTROL_PATTERN)


def neutralize(text: str) -> str:
    """Return `text` with every control token of the known chat formats broken by a space."""
    while True:
        broken = _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if broken == text:
            return text
        text = broken  # breaking one token may expose another, like <|[INST]|>


class Piece(NamedTuple):
    """A part of a rendered conversation; each piece is tokenized on its own."""

    text: str
    has_loss: bool = False
    """True if the model is trained to write it."""
    ends_turn: bool = False
    """True if the token that ends the model's turn follows."""


@dataclass(frozen=True)
class ChatTemplate:
    """The texts around the messages of a conversation."""

    name: Literal["gemma", "plain"]
    user_start: str
    user_end: str
    model_start: str
    stop: str | None
    """The token that ends the model's turn; None: the tokenizer's end-of-sequence token."""
    between: str = ""
    """The text between the end of a reply and the next turn."""

    def render(self, messages: Conversation, *, add_generation_prompt: bool = False) -> list[Piece]:
        """Return the pieces of a conversation: a prompt and a reply in turn.

        Gemma has no system role; its documentation puts the instruction at the beginning of
        the user's turn (https://ai.google.dev/gemma/docs/core/prompt-structure).

        Args:
            messages: the conversation.
            add_generation_prompt: end with the start of the model's turn, for it to reply.
        """
        pieces: list[Piece] = []
        instruction = ""
        for number, message in enumerate(messages, 1):
            text = neutralize(message.content)
            if message.role == "system":
                instruction = f"{text.strip()}\n\n" if text else ""
            elif message.role == "user":
                between = self.between if pieces else ""
                turn = f"{self.user_start}{instruction}{text.strip()}{self.user_end}"
                replied = add_generation_prompt or number < len(messages)
                pieces.append(Piece(between + turn + (self.model_start if replied else "")))
                instruction = ""
            else:
                pieces.append(Piece(text, has_loss=message.weight != 0, ends_turn=True))
        return pieces

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens a tokenizer must have for this template to work."""
        texts = self.user_start + self.user_end + self.model_start + (self.stop or "")
        return tuple(dict.fromkeys(_CONTROL.findall(texts)))


TEMPLATES: dict[str, ChatTemplate] = {
    "gemma": ChatTemplate(
        "gemma",
        user_start="<start_of_turn>user\n",
        user_end="<end_of_turn>\n",
        model_start="<start_of_turn>model\n",
        stop="<end_of_turn>",
        between="\n",
    ),
    "plain": ChatTemplate("plain", user_start="", user_end="\n", model_start="", stop=None),
}
