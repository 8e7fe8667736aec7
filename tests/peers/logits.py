"""Logits of models and adapters: logits.py REQUESTS.json.

A request has `model`, a folder; `adapter`, a PEFT folder or null; `merge`, whether the adapter is
merged in by PEFT; `prompts`, lists of tokens; `out`, an .npz file of a [length, vocabulary] each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def answer(request: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="eager"
    )
    if request["adapter"]:
        model = PeftModel.from_pretrained(model, request["adapter"])
    if request["merge"]:
        model = model.merge_and_unload()
    model.eval()
    logits = {}
    with torch.no_grad():
        for number, prompt in enumerate(request["prompts"]):
            logits[str(number)] = model(torch.tensor([prompt])).logits[0].numpy()
    np.savez(request["out"], **logits)


if __name__ == "__main__":
    for request in json.loads(Path(sys.argv[1]).read_text()):
        answer(request)
