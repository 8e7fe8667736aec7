"""Time to quality: how soon the recommended recipe reaches the published one's final loss.

The published recipe is the notebook's loop: KerasHub's `fit`, one example a step padded to 256
tokens, SGD at 1e-4, loss on every token, one pass over the examples. The recommended recipe is the
shipped spec `chatdoctor-gemma3-1b`, with packing and this project's step. Both train LoRA of rank
16 on the `tiny` preset with the same examples, made of the shipped dialogues at the lengths of real
ones. The loss on held-out responses is measured after each of our steps. Seconds are training
without compilation.

    uv run python -m tests.benchmarks.time_to_quality [--json FILE] [--set KEY=VALUE]
"""

import os
import time
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.notebook import LENGTH, Notebook

os.environ["KERAS_BACKEND"] = "jax"
HELD_OUT = 100


def make_examples(count: int, codec: Any) -> list[Any]:
    """Return examples made of the shipped dialogues, as long as real dialogues."""
    import json
    from importlib import resources

    import numpy as np

    from tests.conversations import token_example

    generator = np.random.default_rng(0)
    lines = (resources.files("job") / "samples" / "dialogues.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    prompts, responses = (codec.encode([row[key] for row in rows]) for key in ("input", "output"))

    def fill(texts: list[list[int]], length: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += texts[generator.integers(len(texts))]
        return tokens[:length]

    made = []
    for number, size in enumerate(generator.normal(225, 60, size=count)):
        length = int(np.clip(size, 40, LENGTH))
        prompt = length - int(0.43 * length)
        tokens = fill(prompts, prompt) + fill(responses, length - prompt)
        made.append(token_example(str(number), tokens, prompt))
    return made


def published(folder: str, examples: list[Any]) -> tuple[list[Any], float]:
    """Run the notebook's loop; return its adapter and its seconds."""
    import keras_hub

    from job.machine.devices import CompileClock

    task = keras_hub.models.CausalLM.from_preset(folder, preprocessor=None, dtype="float32")
    notebook = Notebook(task, examples)
    clock = CompileClock()
    clock.listen()
    begin = time.perf_counter()
    notebook.fit(len(examples), 1)
    seconds = time.perf_counter() - begin - clock.seconds
    layers = [layer for layer in task.backbone._flatten_layers() if hasattr(layer, "lora_kernel_a")]
    return [(layer.lora_kernel_a.value, layer.lora_kernel_b.value) for layer in layers], seconds


def main() -> None:
    """Run both recipes and print how much sooner the recommended one gets there."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--examples", type=int, default=1800)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    given = parser.parse_args()

    import jax
    import numpy as np
    from jax.sharding import Mesh

    from job.data.packing import make_rows
    from job.model.language_model import ForwardConfig
    from job.model.load import load_model
    from job.model.lora import LoraWeights, flatten_lora
    from job.spec.load import load_spec
    from job.train.optimizer import make_optimizer
    from job.train.schedule import BatchSchedule
    from job.train.state import TrainState
    from job.train.step import (
        StepConfig,
        make_train_step,
        make_validation,
        padded_loss_count,
        shard_input,
    )
    from tests.conversations import most_losses

    settings = ["model.preset=tiny", "model.dtype=float32", *given.settings]
    spec = load_spec("chatdoctor-gemma3-1b", settings).spec
    train = spec.train
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    model = load_model(spec.model, spec.seed, mesh)
    everything = make_examples(given.examples + HELD_OUT, model.tokenizer)
    examples, held_out = everything[:-HELD_OUT], everything[-HELD_OUT:]

    forward = ForwardConfig(packed=True, remat=train.remat, longest=LENGTH)
    validate = make_validation(model, forward)
    unseen = make_rows(held_out, train.row_length, packing=True).batch
    placed = shard_input(model, unseen, 1, padded_loss_count(most_losses(unseen, 1)))

    def measure(lora: LoraWeights) -> float:
        return float(validate(lora, model.weights, placed).loss) / float(unseen.weights.sum())

    start = model.lora.init(spec.seed)
    before = measure(start)
    theirs, their_seconds = published(model.preset.handle, examples)
    scale = 1 / model.lora.scale  # theirs is the layer's own, whose alpha is the rank
    goal = measure(tuple((a, b * scale) for a, b in theirs))

    rows = make_rows(examples, train.row_length, packing=True)
    plan = BatchSchedule(len(rows.batch), train.batch_size, train.epochs, spec.seed)
    optimizer, _ = make_optimizer(train, plan.steps, start)
    variables = tuple(variable.value for variable in optimizer.variables)
    state = TrainState(*jax.tree.map(lambda a: jax.numpy.array(a, copy=True), (start, variables)))
    batches = [rows.batch.take(plan.batch_indices(step)) for step in range(plan.steps)]
    width = padded_loss_count(max(most_losses(batch, 1) for batch in batches))
    step = make_train_step(model, optimizer, StepConfig(forward))
    step.lower(state, model.weights, shard_input(model, batches[0], 1, width)).compile()

    seconds, reached, curve, seen = 0.0, None, [], 0
    for number, batch in enumerate(batches):
        begin = time.perf_counter()
        state, _ = step(state, model.weights, shard_input(model, batch, 1, width))
        jax.block_until_ready(flatten_lora(state.lora))
        seconds += time.perf_counter() - begin
        taken = plan.batch_indices(number)
        seen += sum(len(rows.examples[row]) for row in taken if row >= 0)
        loss = measure(state.lora)
        curve.append((number + 1, seen, seconds, loss))
        if reached is None and loss <= goal:
            reached = (seen, seconds)
    report.show(
        f"validation loss on {HELD_OUT} held-out responses; {before:.4f} before training",
        ("recipe", "examples", "seconds", "loss"),
        [
            ("published", len(examples), their_seconds, goal),
            *(("recommended", *line[1:]) for line in curve[:: max(1, len(curve) // 8)]),
            ("recommended, final", *curve[-1][1:]),
        ],
    )
    if reached is None:
        raise SystemExit("the recommended recipe never reached that loss")
    report.finish(
        {
            "time_ratio": their_seconds / reached[1],
            "examples_ratio": len(examples) / reached[0],
        },
        given.json,
    )


if __name__ == "__main__":
    main()
