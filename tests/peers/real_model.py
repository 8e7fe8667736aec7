"""Logits, answers and losses by transformers and PEFT: real_model.py REQUEST OUT.

REQUEST is a JSON list of {name, model, adapter, prompts, every, chats, new_tokens, stop_ids, rows,
questions, letters}:
`adapter` a PEFT folder or null; of each of `prompts` the logits at each position that `every`
divides; of each of `chats` the greedy continuation; of `rows`, {token_ids, loss_mask} each, the
mean cross-entropy of the tokens with a loss; of each of `questions` the logits of the tokens
`letters` after it. OUT, an .npz file, gets `NAME logits N`, `NAME answer N`, `NAME loss` and
`NAME letters`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def load(request: dict[str, Any]) -> Any:
    """Return the model in float32, with its adapter."""
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="eager"
    )
    if request["adapter"]:
        model = PeftModel.from_pretrained(model, request["adapter"])
    return model.eval()


def mean_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Return nats per token with a loss."""
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row["token_ids"]])
        at = torch.tensor(row["loss_mask"][1:]).nonzero()[:, 0]  # before each token with a loss
        logits = model(tokens, logits_to_keep=at).logits[0]
        scores = logits.double().log_softmax(-1)  # float32 rounds 1e-5
        total -= scores.gather(1, tokens[0, at + 1, None]).sum().item()
        count += len(at)
    return total / count


arrays: dict[str, Any] = {}
with torch.no_grad():
    for request in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        model, name = load(request), request["name"]
        for number, prompt in enumerate(request["prompts"]):
            at = torch.arange(0, len(prompt), request["every"])
            logits = model(torch.tensor([prompt]), logits_to_keep=at).logits[0]
            arrays[f"{name} logits {number}"] = logits.numpy()
        for number, chat in enumerate(request["chats"]):
            answer = model.generate(
                torch.tensor([chat]), do_sample=False, max_new_tokens=request["new_tokens"],
                eos_token_id=request["stop_ids"], pad_token_id=request["stop_ids"][0],
            )  # fmt: skip
            arrays[f"{name} answer {number}"] = answer[0, len(chat) :].numpy()
        if request["questions"]:
            arrays[f"{name} letters"] = np.array(
                [
                    model(torch.tensor([ids]), logits_to_keep=1)
                    .logits[0, 0, request["letters"]]
                    .tolist()
                    for ids in request["questions"]
                ]
            )
        if request["rows"]:
            arrays[f"{name} loss"] = mean_loss(model, request["rows"])
np.savez(sys.argv[2], **arrays)
