"""Token ids and loss masks stay what earlier releases trained and evaluated with."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.chat.conversation import Message
from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example
from job.data.packing import TokenExample, tokenize
from job.model.tiny import tiny_preset
from tests.conversations import chat_tokenizer

RECORDED = json.loads((Path(__file__).parent / "recorded_tokens.json").read_text("utf-8"))
"""Samples and longer dialogues; some are truncated, some have control tokens in their text."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ChatTokenizer]:
    import keras_hub

    tokenizer = keras_hub.models.Tokenizer.from_preset(str(tiny_preset()))
    return {name: chat_tokenizer(tokenizer, name) for name in ("gemma", "plain")}


@pytest.mark.parametrize("recorded", RECORDED)
def test_conversations_give_the_recorded_tokens(
    recorded: dict[str, Any], tokenizers: dict[str, ChatTokenizer]
) -> None:
    tokenizer = tokenizers[recorded["template"]]
    messages = tuple(Message(**message) for message in recorded["messages"])
    (example,) = tokenize(
        [Example("a", messages)], tokenizer, recorded["max_length"], recorded["loss_on"]
    ).examples
    mask = [digit == "1" for digit in recorded["loss_mask"]]
    assert example == TokenExample("a", recorded["token_ids"], mask)
    assert tokenizer.encode_prompts([messages[:-1]]) == [recorded["prompt_ids"]]


def test_a_text_prompt_is_only_the_start_token_and_the_text(
    tokenizers: dict[str, ChatTokenizer],
) -> None:
    ids = [2, 91, 1993, 417, 357, 2017, 343, 853, 7, 2011, 1483, 1999, 274, 2017]
    assert tokenizers["gemma"].encode_prompts(["Question: raw\nAnswer:"]) == [ids]
