"""lm-evaluation-harness on MedMCQA-like questions: harness.py MODEL QUESTIONS EXAMPLES NUMBER OUT.

MODEL is a transformers folder with a `tokenizer.model`. QUESTIONS and EXAMPLES are JSON lines in
MedMCQA's columns; the first NUMBER of EXAMPLES are the few-shot examples. OUT receives a JSON list
of the loglikelihoods of A to D. The task is the harness's own `medmcqa` with rows from a file.
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, GemmaTokenizer

TASK = """\
include: {package}/tasks/medmcqa/medmcqa.yaml
task: medmcqa_file
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {questions}, train: {examples}}}
test_split: null
fewshot_split: train
fewshot_config: {{sampler: first_n}}
"""


def main(model: Path, questions: str, examples: str, number: int, out: Path) -> None:
    causal = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = GemmaTokenizer.from_pretrained(model, add_bos_token=True)
    harness = HFLM(
        pretrained=causal, tokenizer=tokenizer, batch_size=8, add_bos_token=True, max_length=8192
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(lm_eval.__file__).parent
        text = TASK.format(package=package, questions=questions, examples=examples)
        (Path(folder) / "task.yaml").write_text(text)
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=["medmcqa_file"],
            num_fewshot=number,
            task_manager=TaskManager(include_path=folder),
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = sorted(results["samples"]["medmcqa_file"], key=lambda sample: sample["doc_id"])
    scores = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    out.write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
