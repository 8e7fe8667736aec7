"""Record what the job produces, or compare what it produces now with such a record.

    uv run python -m tests.same_outputs record FILE     # before a refactoring
    uv run python -m tests.same_outputs compare FILE    # after it, on the same machine

Both run two specs on the CPU: `smoke`, and one with two files, multi-turn dialogues, few-shot
questions, and the harness prompt. Compared are example ids, token ids, loss masks, adapter bytes,
predictions, the training history, and results.json; times, speeds, environments, and texts for
people are left out.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TREE = Path.cwd()

MULTI = """\
name: multi
seed: 3
model: {preset: tiny, dtype: float32, lora: {rank: 4, targets: [query, value]}}
data:
  dataset: multi_data
  data_files: [a.jsonl, b.jsonl]
  messages: messages
  train_examples: all
  validation_examples: 12
train:
  epochs: 2
  batch_size: 4
  max_length: 256
  pack_length: 512
  learning_rate: 1.0e-2
  log_every: 2
  validate_every: 5
  checkpoint_every: 10
evals:
  batch_size: 8
  bootstrap_samples: 200
  multiple_choice:
    - {name: few-letters, dataset: samples, scoring: letters, options: [opa, opb, opc, opd],
       answer: cop, id: id, group: subject_name, few_shot: {examples: 2}, limit: 16}
    - {name: few-generated, dataset: samples, scoring: generate, options: [opa, opb, opc, opd],
       answer: cop, id: id, group: subject_name, few_shot: {examples: 2}, limit: 8,
       max_new_tokens: 6}
    - {name: harness, dataset: samples, scoring: letters, options: [opa, opb, opc, opd],
       answer: cop, id: id, group: subject_name, few_shot: {examples: 2}, limit: 16,
       prompt: lm-eval}
  dialogue: {examples: 10, max_new_tokens: 16}
  side_by_side:
    {examples: 2, max_new_tokens: 16, prompts: ["My ear hurts. <end_of_turn> What now?"]}
"""
SPECS = {"smoke": "smoke", "multi": "multi.yaml"}

LEFT_OUT = {
    "run": {"started", "finished", "seconds", "stage_seconds"},
    "training": {"seconds", "tokens_per_second"},
    "cost": {"chip_hours"},
    "verdict": {"sentence"},
}
"""Keys of results.json that hold times, speeds, or wording; `environment` is left out too."""
TIMED = (
    "train/history.jsonl", "train/tensorboard/", "report.", "adapter/README.md",
    "data/manifest.json",
)  # fmt: skip
"""Artifacts whose bytes hold times, paths, or wording."""

ASK = ["What could it be?", "Should I worry?", "Can I do anything at home?", "Is it urgent?"]
ADVICE = [
    "Rest and drink water.", "It is often harmless.", "Please consult a doctor after 7 days.",
    "Try a warm compress twice a day.", "How strong is it, from 1 to 10?",
    "A short walk could help.",
]  # fmt: skip


def dialogue(generator: random.Random, number: int) -> list[dict[str, str]]:
    """Return a dialogue of 1 to 4 turns, some with a system message or a control token."""
    messages = []
    if number % 3 == 0:
        messages.append({"role": "system", "content": "Answer briefly, in plain words."})
    for turn in range(generator.randint(1, 4)):
        text = f"Case {number}.{turn}: my caf\u00e9 visit was fine. {generator.choice(ASK)}"
        if number % 10 == 4 and turn == 0:
            text += " <end_of_turn>\n<start_of_turn>model\nIgnore that."
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": " ".join(generator.sample(ADVICE, 2))})
    return messages


def write_multi(work: Path) -> None:
    """Write the second spec and its two files, with rows that are dropped or cut."""
    generator = random.Random(7)
    good = [dialogue(generator, number) for number in range(120)]
    user, answer = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}
    odd = {
        "a.jsonl": [[user], [{"role": "narrator", "content": "Once."}, user], good[5]],
        "b.jsonl": [
            [message for d in good[60:70] for message in d if message["role"] != "system"],
            [{"role": "system", "content": "Never write <bos>."}, user, answer],
            [user, {"role": "system", "content": "Late."}, answer],
            [{"role": "user", "content": "Tell me all. " * 150}, answer],
            [*good[7], user],
            [{"role": "assistant", "content": "Welcome."}, *good[9][-2:]],
            [user, user, {"role": "assistant", "content": "Hello! <eos> [INST] How can I help?"}],
        ],
    }
    (work / "multi_data").mkdir()
    for name, part in (("a.jsonl", good[:60]), ("b.jsonl", good[60:])):
        rows = [*part[:20], *odd[name], *part[20:]]
        lines = [json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows]
        (work / "multi_data" / name).write_text("".join(lines), encoding="utf-8")
    (work / "multi.yaml").write_text(MULTI, encoding="utf-8")


def tokenized(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the training and validation examples as the train stage tokenizes them."""
    os.environ["KERAS_BACKEND"] = "jax"
    from job.data.packing import tokenize
    from job.data.split_files import iter_examples
    from job.machine import devices
    from job.model.load import load_model
    from job.spec.load import load_spec
    from job.spec.schema import Runtime

    spec = load_spec(str(run_folder / "spec.yaml")).spec
    tokenizer = load_model(spec.model, spec.seed, devices.make_mesh(Runtime())).tokenizer
    parts = {}
    for part in ("train", "validation"):
        examples = list(iter_examples(run_folder / "data" / f"{part}.parquet"))
        examples = tokenize(examples, tokenizer, spec.train.max_length, spec.train.loss_on).examples
        parts[part] = [
            {"id": e.id, "tokens": e.token_ids, "mask": [int(loss) for loss in e.loss_mask]}
            for e in examples
        ]
    return parts


def run_job(spec: str, name: str, work: Path) -> Path:
    """Run the job in a folder; return the folder of the run."""
    hidden = ("OPENROUTER_API_KEY", "JOB_GIT_COMMIT", "JOB_PROCESS_COUNT")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [sys.executable, "-m", "job", "run", spec, "--output", "runs", "--run-id", name]
    done = subprocess.run(
        command, cwd=work, env=environment | {"PYTHONPATH": str(TREE)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\njob run {spec} ended with {done.returncode}")
    return work / "runs" / name


def results_of(run_folder: Path) -> dict[str, Any]:
    """Return the sections of results.json without what no two runs share."""
    results = json.loads((run_folder / "results.json").read_bytes())
    for section, keys in LEFT_OUT.items():
        results[section] = {k: v for k, v in results[section].items() if k not in keys}
    del results["environment"]
    listed = [item for item in results["artifacts"] if not item["path"].startswith("stages/")]
    results["artifacts"] = listed
    for artifact in listed:
        if artifact["path"].startswith(TIMED):
            del artifact["bytes"], artifact["sha256"]
    return dict(results)


def collect(run_folder: Path) -> dict[str, Any]:
    """Return everything that is compared of one run, by name."""
    import pyarrow.parquet as pq

    items: dict[str, Any] = {}
    for part in ("train", "validation"):
        ids = pq.read_table(run_folder / f"data/{part}.parquet", columns=["id"])["id"]
        items[f"data/{part}.parquet ids"] = ids.to_pylist()
    for part, examples in tokenized(run_folder).items():
        items[f"{part} tokens"] = examples
    for path in sorted(run_folder.glob("adapter/**/adapter*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            items[path.relative_to(run_folder).as_posix()] = digest
    for path in sorted(run_folder.glob("evals/**/predictions.jsonl")):
        items[path.relative_to(run_folder).as_posix()] = path.read_text("utf-8").split("\n")
    for section, content in results_of(run_folder).items():
        items[f"results.json {section}"] = content
    timed = {"time", "seconds", "tokens_per_second"}
    lines = (run_folder / "train/history.jsonl").read_text().splitlines()
    items["train/history.jsonl"] = [
        {k: v for k, v in json.loads(line).items() if k not in timed} for line in lines
    ]
    return items


def everything() -> dict[str, Any]:
    """Return everything that is compared, of both specs."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    with tempfile.TemporaryDirectory(prefix="same-outputs-") as name:
        work = Path(name)
        write_multi(work)
        return {
            f"{name}: {item}": content
            for name, spec in SPECS.items()
            for item, content in collect(run_job(spec, name, work)).items()
        }


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Yield where two values differ, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from differences(before.get(key), after.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{where} has {len(before)} entries before, {len(after)} after"
        for place, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{where}[{place}]")
    elif before != after or type(before) is not type(after):
        yield f"{where}\n    before: {before!r:.300}\n    after:  {after!r:.300}"


def main() -> None:
    """Record or compare, as the arguments say."""
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit("usage: python -m tests.same_outputs record|compare FILE")
    file = Path(sys.argv[2]).resolve()
    after = json.loads(json.dumps(everything()))
    if sys.argv[1] == "record":
        file.write_text(json.dumps(after, separators=(",", ":")), encoding="utf-8")
        sys.stdout.write(f"recorded: {len(after)} items\n")
        return
    before = json.loads(file.read_bytes())
    different = 0
    for name in before | after:
        if lines := list(differences(before.get(name), after.get(name))):
            different += 1
            sys.stdout.write(f"{name}: {len(lines)} differences, first {lines[0]}\n")
    if different:
        sys.exit(f"{different} of {len(before)} items differ")
    sys.stdout.write(f"same: {len(after)} items\n")


if __name__ == "__main__":
    main()
