"""The one form of a conversation: messages, as in OpenAI's API and `apply_chat_template`.

`job.chat.tokenizer.ChatTokenizer.tokenize` turns conversations into token ids and a loss mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the conversation."""

    role: Role
    content: str
    weight: int = 1
    """0 excludes this assistant message from the loss."""


Conversation = Sequence[Message]
"""An optional system message, then messages of the user and the assistant in turn."""


class TokenizedConversation(NamedTuple):
    """A conversation as a model reads it; both lists are `[tokens]`."""

    token_ids: list[int]
    loss_mask: list[bool]
    """True where the model is trained to predict the token: replies and the ends of their turns."""
