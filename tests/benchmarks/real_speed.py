"""Real weights: training against TRL and PEFT, evaluation against lm-evaluation-harness.

SmolLM2-135M-Instruct in float32 with LoRA on query and value, on dialogues of the shipped samples
(or of a JSON file in ChatDoctor's columns), rendered by the model's own chat template. Both sides
train on the same token ids with a loss on the same tokens, for one epoch after a warm-up; padding
does not count. Both score the letters of the same questions, the harness with its `hf` model, and
answer the same dialogues greedily. The other side runs in the environment of `tests/peers`.

    uv run --extra demo python -m tests.benchmarks.real_speed [--data FILE] [--examples 96]
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.peers import run_peer

os.environ["KERAS_BACKEND"] = "jax"
SAMPLES = Path(__file__).parents[2] / "job/samples"
RANK, LETTERS, NEW_TOKENS = 16, "ABCD", 48
PEER_SECONDS = 3600


def read_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first rows of JSON lines, or of a JSON array."""
    text = path.read_text("utf-8")
    rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    return list(rows)[:count]


def main() -> None:
    """Measure both sides and print the ratios."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=SAMPLES / "dialogues.jsonl")
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--pack-length", type=int, default=1024)
    given = parser.parse_args()

    from job.chat.conversation import MarkedText, Message
    from job.chat.text_tokenizer import FastTokenizer
    from job.data.examples import Example
    from job.data.packing import tokenize
    from job.evals.engine import Engine
    from job.machine import devices
    from job.model.load import load_model
    from job.spec.schema import Lora, Model, Runtime
    from tests.benchmarks.train_speed import ours

    spec = Model(
        preset="smollm2-135m-instruct",
        dtype="float32",
        lora=Lora(rank=RANK, targets=["query", "value"]),
    )
    model = load_model(spec, 0, devices.make_mesh(Runtime()))
    chat = model.tokenizer
    rows = read_rows(given.data, given.examples)
    conversations = [
        (Message("system", row["instruction"]), Message("user", row["input"]),
         Message("assistant", row["output"]))
        for row in rows
    ]  # fmt: skip
    named = [Example(str(number), messages) for number, messages in enumerate(conversations)]
    examples = tokenize(named, chat, given.pack_length, "response").examples
    asked = read_rows(SAMPLES / "questions.jsonl", given.questions)
    questions = [
        chat.renderer.prompt([Message("user", "\n".join(
            [row["question"], *(f"{letter}. {row[f'op{letter.lower()}']}" for letter in LETTERS)]
        ))])
        for row in asked
    ]  # fmt: skip
    dialogues = [
        chat.renderer.prompt(messages[:-1]) for messages in conversations[: given.dialogues]
    ]

    mine = ours(model, examples, given.rows, given.pack_length, "matmuls", 1)
    engine = Engine(model, 8, 8192)
    letters = chat.letter_tokens(LETTERS)
    fast = FastTokenizer(Path(model.preset.handle))

    def ids(texts: list[str]) -> list[list[int]]:
        return [tokens.token_ids for tokens in fast.encode([MarkedText(text) for text in texts])]

    engine.loglikelihood(model.weights, ids(questions), letters, "warm-up")
    begin = time.perf_counter()
    scores = engine.loglikelihood(model.weights, ids(questions), letters, "letters")
    letter_seconds = time.perf_counter() - begin
    engine.generate(model.weights, ids(dialogues), NEW_TOKENS, "warm-up")
    begin = time.perf_counter()
    engine.generate(model.weights, ids(dialogues), NEW_TOKENS, "dialogues")
    dialogue_seconds = time.perf_counter() - begin

    batch_sizes = [1, 4, 8]
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder, "request.json"), Path(folder, "out.json")
        request.write_text(json.dumps({
            "model": model.preset.handle, "rank": RANK, "targets": ["q_proj", "v_proj"],
            "examples": [{"token_ids": e.token_ids, "loss_mask": e.loss_mask} for e in examples],
            "batch_sizes": batch_sizes, "questions": questions, "letters": LETTERS,
            "dialogues": dialogues, "max_new_tokens": NEW_TOKENS,
        }))  # fmt: skip
        run_peer("real_speed.py", request, out, seconds=PEER_SECONDS)
        theirs = json.loads(out.read_text())
    tokens = sum(len(example.token_ids) for example in examples)
    speeds = [tokens / seconds for seconds in theirs["train"]]
    report.show(
        f"SmolLM2-135M-Instruct, float32, {len(examples)} dialogues of {tokens:,} tokens",
        ("loop", "useful tokens/s"),
        [
            *((f"TRL + PEFT, batch {n}", s) for n, s in zip(batch_sizes, speeds, strict=True)),
            (f"ours, {given.rows} packed rows", mine.tokens_per_second),
        ],
    )
    same = sum(
        int(a) == b for a, b in zip(scores.argmax(axis=1), theirs["best_letters"], strict=True)
    )
    report.show(
        "evaluation, seconds",
        ("what", "harness", "ours"),
        [
            (f"letters of {len(questions)} questions", theirs["letters"], letter_seconds),
            (
                f"{len(dialogues)} answers of {NEW_TOKENS} tokens",
                theirs["dialogues"],
                dialogue_seconds,
            ),
        ],
    )
    report.finish(
        {
            "train_vs_trl_best": mine.tokens_per_second / max(speeds),
            "train_vs_trl_batch_1": mine.tokens_per_second / speeds[0],
            "letters_vs_harness": theirs["letters"] / letter_seconds,
            "dialogues_vs_harness": theirs["dialogues"] / dialogue_seconds,
            "same_letters": same / len(questions),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
