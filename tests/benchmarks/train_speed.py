"""Training speed: the published notebook's loop against this project's step, on one machine.

The published loop is KerasHub's task `fit` with SGD: one example a step, padded to 256 tokens, with
logits for every position; and the same at batch size 8. Both sides train the same LoRA on the same
random examples with the lengths of real dialogues (mean 210 tokens of at most 256, 43 % response).
Padding does not count. FLOPs and memory are reported by the compiler, the same on every machine;
seconds are this machine's.

    uv run python -m tests.benchmarks.train_speed [--shape proxy|1b] [--dtype float32]
"""

import os
import time
from dataclasses import dataclass
from typing import Any

from job.machine import accelerators
from tests.benchmarks import report
from tests.benchmarks.notebook import LENGTH, Notebook
from tests.benchmarks.shapes import SHAPES, make_model, make_task

os.environ["KERAS_BACKEND"] = "jax"


@dataclass
class Metrics:
    """What one loop costs: FLOPs per example, memory in bytes."""

    tokens_per_second: float
    flops: float
    temporary: int
    compile_seconds: float
    loss: float


def make_examples(count: int, vocabulary: int) -> list[Any]:
    """Return random tokens with the lengths of real dialogues."""
    import numpy as np

    from tests.conversations import token_example

    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(225, 60, size=count), 40, LENGTH).astype(int)
    return [
        token_example(
            str(i), generator.integers(10, vocabulary, size=n).tolist(), n - int(0.43 * n)
        )
        for i, n in enumerate(lengths)
    ]


def published(shape: str, dtype: str, examples: list[Any], batch: int, repeats: int) -> Metrics:
    """Measure the notebook's loop at a batch size."""
    import jax

    from job.machine.devices import CompileClock

    task = make_task(shape, dtype)
    notebook = Notebook(task, examples)
    clock = CompileClock()
    clock.listen()
    notebook.fit(batch, batch)
    compiled = clock.seconds
    seconds, loss = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        loss = notebook.fit(len(examples), batch)
        seconds.append(time.perf_counter() - start)
    state = (
        [v.value for v in task.trainable_variables],
        [v.value for v in task.non_trainable_variables],
        [v.value for v in task.optimizer.variables],
        [v.value for v in task.metrics_variables],
    )
    program = jax.jit(task.train_step, donate_argnums=0)
    costs = program.lower(state, notebook.rows(batch)).compile()
    return Metrics(
        tokens_per_second=sum(len(e.token_ids) for e in examples) / min(seconds),
        flops=costs.cost_analysis()["flops"] / batch,
        temporary=costs.memory_analysis().temp_size_in_bytes,
        compile_seconds=compiled,
        loss=loss,
    )


def ours(
    model: Any, examples: list[Any], batch_size: int, length: int, remat: Any, repeats: int
) -> Metrics:
    """Measure this project's step on packed rows."""
    import jax

    from job.data.packing import make_rows
    from job.machine.devices import CompileClock
    from job.model.language_model import ForwardConfig
    from job.model.lora import flatten_lora
    from job.spec.schema import Train
    from job.train.optimizer import make_optimizer
    from job.train.schedule import BatchSchedule
    from job.train.state import TrainState
    from job.train.step import (
        StepConfig,
        make_train_step,
        padded_loss_count,
        shard_input,
    )
    from tests.conversations import most_losses

    rows = make_rows(examples, length, packing=True)
    plan = BatchSchedule(len(rows.batch), batch_size, 1, 0)
    start = model.lora.init(0)
    train = Train(optimizer="sgd", learning_rate=1e-4, schedule="constant", warmup_ratio=0)
    optimizer, _ = make_optimizer(train, plan.steps, start)
    state = TrainState(*jax.tree.map(
        lambda a: jax.numpy.array(a, copy=True),
        (start, tuple(v.value for v in optimizer.variables)),
    ))  # fmt: skip
    batches = [rows.batch.take(plan.batch_indices(step)) for step in range(plan.steps)]
    step = make_train_step(model, optimizer, StepConfig(ForwardConfig(True, remat, rows.longest)))
    width = padded_loss_count(max(most_losses(batch, 1) for batch in batches))
    clock = CompileClock()
    clock.listen()
    program = step.lower(state, model.weights, shard_input(model, batches[0], 1, width)).compile()
    compiled = clock.seconds
    state, metrics = program(state, model.weights, shard_input(model, batches[0], 1, width))
    jax.block_until_ready(flatten_lora(state.lora))
    seconds, loss = [], 0.0
    for _ in range(repeats):
        sums = []
        begin = time.perf_counter()
        for batch in batches:
            state, metrics = program(state, model.weights, shard_input(model, batch, 1, width))
            sums.append(metrics)
        jax.block_until_ready(flatten_lora(state.lora))
        seconds.append(time.perf_counter() - begin)
        loss = sum(float(f.loss) for f in sums) / sum(float(f.tokens) for f in sums)
    return Metrics(
        tokens_per_second=sum(len(e.token_ids) for e in examples) / min(seconds),
        flops=program.cost_analysis()["flops"] * plan.steps / len(examples),
        temporary=program.memory_analysis().temp_size_in_bytes,
        compile_seconds=compiled,
        loss=loss,
    )


def main() -> None:
    """Measure all loops and print the ratios."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="proxy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1, help="the fastest one counts")
    parser.add_argument("--rows", type=int, default=2, help="packed rows a step")
    parser.add_argument("--pack-length", type=int, default=1024)
    given = parser.parse_args()
    examples = make_examples(given.examples, SHAPES[given.shape]["vocabulary_size"])
    common = (given.shape, given.dtype, examples)
    one = published(*common, 1, given.repeats)
    eight = published(*common, 8, given.repeats)
    mine, least = (
        ours(
            make_model(given.shape, given.dtype), examples, given.rows, given.pack_length, remat,
            given.repeats,
        )
        for remat in ("matmuls", "blocks")
    )  # fmt: skip

    import jax

    device = jax.devices()[0]
    report.show(
        f"{given.shape}, {given.dtype}, {len(examples)} examples, {device.device_kind}",
        ("loop", "tokens/s", "GFLOPs/example", "temporary MB", "compile s", "loss"),
        [
            (name, f.tokens_per_second, f.flops / 1e9, f.temporary / 1e6, f.compile_seconds, f.loss)
            for name, f in (
                ("published", one),
                ("published, batch 8", eight),
                ("ours", mine),
                ("ours, remat", least),
            )
        ],
    )
    chip = accelerators.find_accelerator(device.device_kind)
    peak = chip.peak_flops if chip else None
    mean = sum(len(e.token_ids) for e in examples) / len(examples)
    best = max(one.tokens_per_second, eight.tokens_per_second)
    report.finish(
        {
            "speed_vs_published": mine.tokens_per_second / one.tokens_per_second,
            "speed_vs_published_best": mine.tokens_per_second / best,
            "flops_vs_published": mine.flops / one.flops,
            "memory_vs_published": mine.temporary / eight.temporary,
            "memory_vs_published_remat": least.temporary / eight.temporary,
            "mfu": mine.tokens_per_second / mean * mine.flops / peak if peak else None,
        },
        given.json,
    )


if __name__ == "__main__":
    main()
