"""Render and tokenize conversations by transformers: `render_chats.py REQUEST ANSWER`.

REQUEST is a JSON list of {folder, template, kwargs, conversations, texts}: a tokenizer's folder,
the text of a chat template (null: the tokenizer's own), {messages, tools} each, and plain texts.
ANSWER gets a list of {ids, prompts, masks, texts}: token ids of the conversations, of each without
its last message and with the start of the model's turn, where replies are (null: the template does
not mark them), and token ids of the texts without special tokens.
"""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils


class Today(datetime):
    """The day that this project tells templates."""

    @classmethod
    def now(cls, tz: Any = None) -> "Today":
        return cls(2024, 7, 26)


chat_template_utils.datetime = Today


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers makes of one request."""
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    if request["template"] is not None:
        tokenizer.chat_template = request["template"]
    marks = "{% generation" in tokenizer.chat_template.replace("{%-", "{%")

    def render(messages: list[Any], tools: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, **options, **request["kwargs"]
        )

    ids, prompts, masks = [], [], []
    for conversation in request["conversations"]:
        messages, tools = conversation["messages"], conversation["tools"]
        complete = render(messages, tools, return_assistant_tokens_mask=marks)
        ids.append(complete["input_ids"])
        masks.append(complete["assistant_masks"] if marks else None)
        prompts.append(render(messages[:-1], tools, add_generation_prompt=True)["input_ids"])
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    return {"ids": ids, "prompts": prompts, "masks": masks, "texts": texts}


requests = json.loads(Path(sys.argv[1]).read_text("utf-8"))
Path(sys.argv[2]).write_text(json.dumps([answer(request) for request in requests]), "utf-8")
