"""The one form of a conversation: messages, as in OpenAI's API and `apply_chat_template`.

`job.chat.tokenizer.ChatTokenizer.tokenize` turns conversations into token ids and a loss mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["tools", "system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the conversation."""

    role: Role
    content: str
    weight: int = 1
    """0 excludes this assistant message from the loss."""
    extra: str = ""
    """Further keys that chat templates read (`tool_calls`, `name`, ...), a JSON object."""


Conversation = Sequence[Message]
"""An optional system message, then messages of the user and the assistant in turn.

With tools, the first message has the role `tools` and their definitions, a JSON list, as content;
a `tool` message, the result of a call, stands in the place of a user's.
"""


class TokenizedConversation(NamedTuple):
    """A conversation as a model reads it; both lists are `[tokens]`."""

    token_ids: list[int]
    loss_mask: list[bool]
    """True where the model is trained to predict the token: replies and the ends of their turns."""
