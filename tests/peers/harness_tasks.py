"""lm-evaluation-harness with its own `hf` model: MODEL FOLDER MAX_LENGTH OUT TASK...

MODEL is a transformers folder, FOLDER has task files. OUT receives a JSON object: the samples of
each task, as [doc_id, metrics, filtered responses] in order. A task `NAME@chat` is run with the
model's chat template.
"""

import json
import sys
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

model, folder, max_length, out, *tasks = sys.argv[1:]
causal = AutoModelForCausalLM.from_pretrained(
    model, dtype=torch.float32, attn_implementation="eager"
)
harness = HFLM(
    pretrained=causal, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1,
    max_length=int(max_length),
)  # fmt: skip
manager = TaskManager(include_path=folder)
found = {}
for name in tasks:
    task, _, chat = name.partition("@")
    results = lm_eval.simple_evaluate(
        model=harness, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0,
        apply_chat_template=bool(chat),
    )  # fmt: skip
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    found[name] = [
        [s["doc_id"], {m: s[m] for m in s["metrics"]}, s["filtered_resps"]] for s in samples
    ]
Path(out).write_text(json.dumps(found, default=float))
