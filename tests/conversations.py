"""Conversations and tokenized examples for tests, in short."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from job.chat.conversation import Message
from job.chat.templates import choose_template
from job.chat.text_tokenizer import KerasTokenizer
from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example
from job.data.packing import Batch, TokenExample


def chat_tokenizer(tokenizer: Any, template: str = "gemma") -> ChatTokenizer:
    """A KerasHub tokenizer with a built-in chat template."""
    wrapped = KerasTokenizer(tokenizer)
    return ChatTokenizer(wrapped, choose_template(template, "test", None, wrapped))


def turns(*texts: str, system: str | None = None) -> tuple[Message, ...]:
    """Messages of the user and the assistant in turn."""
    before = [] if system is None else [Message("system", system)]
    roles = ("user", "assistant")
    return (*before, *(Message(roles[n % 2], text) for n, text in enumerate(texts)))  # type: ignore[arg-type]


def conversation(identity: str, *texts: str, system: str | None = None) -> Example:
    """An example whose last text is the response."""
    return Example(identity, turns(*texts, system=system))


def token_example(identity: str, token_ids: Sequence[int], loss_from: int) -> TokenExample:
    """An example with a loss on the tokens from `loss_from` on."""
    mask = [place >= loss_from for place in range(len(token_ids))]
    return TokenExample(identity, list(token_ids), mask)


def most_losses(batch: Batch, groups: int) -> int:
    """The most tokens with a loss in one of `groups` equal parts of the rows."""
    return int(np.count_nonzero(batch.loss_mask.reshape(groups, -1), axis=1).max())
