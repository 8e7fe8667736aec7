"""What transformers reads in a folder: read_model.py FOLDER TEXTS.json OUT.json.

OUT receives `weights`, the shape, sum, and sum of squares of each by its name; `missing` and
`unexpected`, names in the model only and in the folder only; `token_ids` of each of the texts.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, texts: str, out: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    weights = {}
    for name, weight in model.named_parameters():
        exact = weight.double()
        weights[name] = [list(exact.shape), exact.sum().item(), exact.square().sum().item()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = {
        "weights": weights,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "token_ids": tokenizer(json.loads(Path(texts).read_text()))["input_ids"],
    }
    Path(out).write_text(json.dumps(read))


if __name__ == "__main__":
    main(*sys.argv[1:])
