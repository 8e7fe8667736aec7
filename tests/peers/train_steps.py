"""Plain SGD on an adapter with transformers and PEFT: train_steps.py REQUEST.json.

The request has `model` and `adapter`, folders; `rows`, lists of token ids; `prompt`, the number of
tokens of each row without a loss; `rate` and `steps`; `out`, an .npz file of the losses and, for
each tensor of the adapter, the gradient of the first step and the value after the last.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(path: Path) -> None:
    request = json.loads(path.read_text())
    base = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.float32, attn_implementation="eager"
    )
    model = PeftModel.from_pretrained(base, request["adapter"], is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=request["rate"])
    lengths = [len(row) for row in request["rows"]]
    tokens, labels, mask = torch.zeros(3, len(lengths), max(lengths), dtype=torch.long).unbind()
    labels -= 100
    for number, (row, skipped) in enumerate(zip(request["rows"], request["prompt"], strict=True)):
        tokens[number, : len(row)] = torch.tensor(row)
        labels[number, skipped : len(row)] = torch.tensor(row[skipped:])
        mask[number, : len(row)] = 1
    losses, arrays = [], {}
    for step in range(request["steps"]):
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            arrays |= {f"gradient {name}": p.grad.numpy().copy() for name, p in trained.items()}
        optimizer.step()
    arrays |= {f"value {name}": p.detach().numpy() for name, p in trained.items()}
    np.savez(request["out"], losses=losses, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
