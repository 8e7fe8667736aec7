"""Training by TRL and PEFT, evaluation by lm-evaluation-harness: real_speed.py REQUEST OUT.

REQUEST has `model`, a folder; `examples`, {token_ids, loss_mask} each; `batch_sizes` to train with;
`rank`, `targets`; `questions` and `dialogues`, prompts as text; `letters`; `max_new_tokens`. OUT
gets seconds: `train` by batch size for all examples, `letters`, `dialogues`; and `best_letters`.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def train(request: dict[str, Any], batch_size: int) -> float:
    """Return the seconds of an epoch, after a warm-up of one step."""
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    columns = {
        "input_ids": [example["token_ids"] for example in request["examples"]],
        "completion_mask": [list(map(int, e["loss_mask"])) for e in request["examples"]],
    }
    lora = LoraConfig(
        r=request["rank"], lora_alpha=request["rank"], target_modules=request["targets"]
    )

    def epoch(count: int, folder: str) -> float:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, num_train_epochs=1,
            learning_rate=1e-4, completion_only_loss=True, max_length=None, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_dict({name: values[:count] for name, values in columns.items()})
        trainer = SFTTrainer(
            model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
        begin = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        epoch(batch_size, folder)
        return epoch(len(columns["input_ids"]), folder)


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of both evaluations, and the likeliest letters."""
    model = HFLM(pretrained=request["model"], dtype="float32", batch_size=8, device="cpu")
    pairs = [(q, letter) for q in request["questions"] for letter in request["letters"]]
    options = {
        "until": ["<|im_end|>"],
        "max_gen_toks": request["max_new_tokens"],
        "do_sample": False,
    }

    def instances(kind: Any, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    model.loglikelihood(instances("loglikelihood", pairs[:8]), disable_tqdm=True)
    begin = time.perf_counter()
    scores = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    letters = time.perf_counter() - begin
    width = len(request["letters"])
    values = [score for score, _ in scores]
    rows = [values[at : at + width] for at in range(0, len(values), width)]
    begin = time.perf_counter()
    model.generate_until(
        instances("generate_until", [(text, options) for text in request["dialogues"]]),
        disable_tqdm=True,
    )
    return {
        "letters": letters,
        "best_letters": [row.index(max(row)) for row in rows],
        "dialogues": time.perf_counter() - begin,
    }


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    measured: dict[str, Any] = {"train": [train(wanted, size) for size in wanted["batch_sizes"]]}
    Path(sys.argv[2]).write_text(json.dumps(measured | evaluate(wanted)))
