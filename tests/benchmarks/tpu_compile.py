"""The programs of a TPU through its own compiler, without a TPU: the published step and ours.

The published step is KerasHub's task at batch 1 and length 256 with logits for every position,
on one chip, as the notebook ran it; ours is the recommended spec's on all chips. Seconds are the
roofline's, from the compiler's FLOPs and bytes: they leave out the host, the input pipeline,
launch gaps, and how far a kernel stays behind the peaks; bytes that never leave the chip count as
if they did. Compile seconds are this machine's; their ratio is that of processor seconds, which do
not depend on what else it does. Needs the `tpu` extra:

    uv run --extra tpu python -m tests.benchmarks.tpu_compile [--size 1b 4b 256]
"""

import os
import time
from dataclasses import dataclass
from typing import Any

from job.machine.accelerators import Machine, parse_machine
from tests.benchmarks import report

os.environ["KERAS_BACKEND"] = "jax"
SPEC = "chatdoctor-gemma3-1b"
LENGTH = 256
PRESETS = {"1b": "hf://google/gemma-3-1b-it", "4b": "gemma3_instruct_4b_text"}


@dataclass
class Step:
    """A training step by the compiler."""

    tokens: int
    """Token slots of a step over all devices."""
    parameters: int
    chips: int
    program: Any
    """`job.plan.cost_analysis.CompiledProgram`."""
    seconds: float
    """By the roofline."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def mfu(self, on: Machine) -> float:
        """4 FLOPs a parameter and token, over the peak: what the frozen model must do at least."""
        assert on.accelerator.peak_flops
        peak = on.accelerator.peak_flops * self.chips
        return 4 * self.parameters * self.rate / peak


def roofline(program: Any, on: Machine) -> float:
    """Seconds of whichever bound is the highest."""
    return max(program.costs.bounds(on.accelerator).values())


def published(preset: str, on: Machine) -> Step:
    """The notebook's step on one chip."""
    from job.machine import devices

    with devices.compiling_for(on) as chips:
        import jax
        import keras
        import numpy as np
        from jax.sharding import SingleDeviceSharding

        from job.model.abstract import abstract_array, make_task
        from job.plan.cost_analysis import compile_program
        from job.plan.model_shape import find_config
        from job.spec.schema import Model

        model = Model(preset=preset)
        place = SingleDeviceSharding(chips[0])

        def shapes(variables: Any) -> list[Any]:
            return [abstract_array(v, place) for v in variables]

        task = make_task(model, find_config(model))
        task.backbone.enable_lora(16)
        tokens = np.zeros((1, LENGTH), np.int32)
        data = ({"token_ids": tokens, "padding_mask": tokens}, tokens, tokens)
        task.compile(
            optimizer=keras.optimizers.SGD(1e-4),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        )
        task._symbolic_build(data_batch=data)
        state = (
            shapes(task.trainable_variables),
            shapes(task.non_trainable_variables),
            shapes(task.optimizer.variables),
            shapes(task.metrics_variables),
        )
        abstract = jax.tree.map(lambda a: abstract_array(a, place), data)
        step = jax.jit(task.train_step, donate_argnums=0)
        program = compile_program(step, state, abstract)
        count = task.backbone.count_params()
        return Step(LENGTH, count, 1, program, roofline(program, on))


def compiler(preset: str, on: Machine, *changes: str) -> Any:
    """A `job.plan.tpu_compile.Compiler` of the recommended spec with another model."""
    from job.machine import devices
    from job.plan.model_shape import find_config
    from job.plan.tpu_compile import Compiler
    from job.plan.workload import workload
    from job.spec.load import load_spec

    spec = load_spec(SPEC, [f"model.preset={preset}", "runtime.devices=null", *changes]).spec
    with devices.compiling_for(on) as chips:
        mesh = devices.make_mesh(spec.runtime, chips)
        return Compiler(spec, find_config(spec.model), workload(spec), on, mesh)


def ours(preset: str, on: Machine, *changes: str) -> tuple[Step, Any]:
    """The recommended step, and the compiler for more."""
    from job.machine import devices

    made = compiler(preset, on, *changes)
    asked = made.spec.train.micro_batch
    with devices.compiling_for(on):
        program, _ = made.fitting_step(made.rows if asked == "auto" else asked)
    work = made.work
    tokens = work.slots_a_step
    return Step(tokens, made.model.parameters, on.chips, program, roofline(program, on)), made


def say(name: str, step: Step, on: Machine) -> tuple[str, Step, Machine]:
    """A step's line of the table, told at once: the next may take minutes."""
    print(
        f"{name}: {step.seconds * 1e3:.1f} ms, {step.rate:,.0f} tokens/s, "
        f"{step.program.memory / 1e9:.2f} GB, compiled in {step.program.seconds:.0f} s "
        f"({step.program.cpu_seconds:.0f} s of a core)",
        flush=True,
    )
    return name, step, on


def show(rows: list[tuple[str, Step, Machine]]) -> None:
    """The table of training steps."""
    report.show(
        "training steps, by the TPU compiler",
        ("step", "tokens", "TFLOPs", "GB moved", "ms", "tokens/s", "mfu 4n", "memory GB",
         "compile s", "cpu s"),
        [
            (
                name, step.tokens, step.program.costs.flops / 1e12,
                step.program.costs.bytes_accessed / 1e9, step.seconds * 1e3, step.rate,
                step.mfu(on), step.program.memory / 1e9, step.program.seconds,
                step.program.cpu_seconds,
            )
            for name, step, on in rows
        ],
    )  # fmt: skip


def main() -> None:
    """Compile all and print the ratios."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument(
        "--size", nargs="+", choices=("1b", "4b", "256"), default=["1b", "4b", "256"]
    )
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recommended spec")
    given = parser.parse_args()
    v5e = parse_machine("v5e-8")
    begin = time.perf_counter()
    rows: list[tuple[str, Step, Machine]] = []
    figures: dict[str, Any] = {}
    if "1b" in given.size:
        theirs = published(PRESETS["1b"], v5e)
        rows.append(say("published 1B, one chip", theirs, v5e))
        mine, made = ours(PRESETS["1b"], v5e, *given.set)
        rows.append(say("ours 1B, v5e-8", mine, v5e))
        figures |= compare(theirs, mine, v5e) | evaluations(made, v5e)
    if "4b" in given.size:
        theirs = published(PRESETS["4b"], v5e)
        rows.append(say("published 4B, one chip", theirs, v5e))
        mine, _ = ours(PRESETS["4b"], v5e, *given.set)
        rows.append(say("ours 4B, v5e-8", mine, v5e))
        figures |= {f"{key}_4b": value for key, value in compare(theirs, mine, v5e).items()}
    if "256" in given.size:
        large = parse_machine("v5e-256")
        mine, made = ours(PRESETS["1b"], large, "train.batch_size=512", *given.set)
        rows.append(say("ours 1B, v5e-256", mine, large))
        figures |= {"tokens_per_s_256": mine.rate, "mfu_4n_256": mine.mfu(large)}
    show(rows)
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    report.finish(figures, given.json)


def compare(theirs: Step, mine: Step, on: Machine) -> dict[str, float]:
    """Ours over the published step."""
    return {
        "published_tokens_per_s": theirs.rate,
        "tokens_per_s": mine.rate,
        "speed_vs_published": mine.rate / theirs.rate,
        "mfu_4n": mine.mfu(on),
        "hbm_gb": mine.program.memory / 1e9,
        "compile_seconds": mine.program.seconds,
        "compile_vs_published": mine.program.cpu_seconds / theirs.program.cpu_seconds,
        "compile_wall_vs_published": mine.program.seconds / theirs.program.seconds,
    }


def evaluations(made: Any, on: Machine) -> dict[str, float]:
    """Scoring by letters and decoding, of 256 prompts at once over the chips."""
    from job.machine import devices
    from job.plan.workload import EvalWorkload

    prompts = made.prompts
    with devices.compiling_for(on):
        letters = made.letters(EvalWorkload("medmcqa", "letters", 4183, 192, 0))
        scored = prompts / roofline(letters, on)
        print(f"letters: {scored:,.0f} questions/s", flush=True)
        prefill, decode = made.generation_parts(EvalWorkload("dialogue", "generate", 256, 128, 256))
    turn = roofline(decode, on)
    print(f"decode: {prompts / turn:,.0f} tokens/s, {turn * 1e3:.2f} ms a token", flush=True)
    return {
        "letters_questions_per_s": scored,
        "letters_seconds_4183": 4183 / scored,
        "prefill_prompts_per_s": prompts / roofline(prefill, on),
        "decode_tokens_per_s": prompts / turn,
    }


if __name__ == "__main__":
    main()
