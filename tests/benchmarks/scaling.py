"""Scaling: the same training on 1 to 8 devices and on 2 processes, and what a device holds.

One short training of the shipped smoke spec's model each way, plain SGD so that rounding is not
magnified: the largest relative difference between its losses and those of one device. Then the
bytes of frozen weights a device holds when they are split over 8, beside all of them. Devices
are virtual, on the CPU: this shows that the results agree, not how fast real chips are.

    uv run python -m tests.benchmarks.scaling [--json FILE]
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import report

SPEC = (
    "run", "smoke", "--until", "train", "--run-id", "r", "--set", "train.batch_size=8",
    "--set", "train.optimizer=sgd", "--set", "train.learning_rate=0.5",
    "--set", "train.log_every=1", "--set", "evals.dialogue=null",
    "--set", "evals.multiple_choice=[]", "--set", "evals.side_by_side.examples=0",
    "--set", "reference=null",
)  # fmt: skip


def train(output: Path, devices: int, processes: int = 1, model: int = 1) -> list[float]:
    """Losses of the steps and validations, with `devices` shared out over the processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        }
        if processes > 1:
            environment |= {
                "JOB_COORDINATOR_ADDRESS": address,
                "JOB_PROCESS_COUNT": str(processes),
                "JOB_PROCESS_INDEX": str(index),
            }
        command = [sys.executable, "-m", "job", *SPEC, "--output", str(output)]
        command += ["--set", f"runtime.mesh.model={model}"]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"a training on {devices} devices failed")
    lines = (output / "r/train/history.jsonl").read_text().splitlines()
    return [line.get("loss", line.get("validation_loss")) for line in map(json.loads, lines)]


def frozen_bytes(parts: int) -> int:
    """The most bytes of frozen weights that any of `parts` devices holds."""
    program = (
        "from job import runtime; runtime.set_environment(); import jax, numpy as np\n"
        "from job.model.language_model import load; from job.spec import Model\n"
        f"mesh = jax.make_mesh((1, {parts}), ('data', 'model'))\n"
        "model = load(Model(preset='tiny', dtype='float32'), 0, mesh)\n"
        "held = {}\n"
        "for weight in model.weights:\n"
        "    for shard in weight.addressable_shards:\n"
        "        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes\n"
        "print('held', max(held.values()))\n"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={parts}",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("held"))
    return int(line.split()[1])


def main() -> None:
    """Train each way and print the differences."""
    given = report.arguments(__doc__ or "").parse_args()
    ways = {
        "1 device": (1, 1, 1),
        "8 devices": (8, 1, 1),
        "8 devices, weights split over 4": (8, 1, 4),
        "2 processes, 4 devices each": (8, 2, 1),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, way) in enumerate(ways.items()):
            found[name] = train(Path(folder) / str(number), *way)
    one = found["1 device"]
    differences = {
        name: max(abs(a - b) / abs(b) for a, b in zip(losses, one, strict=True))
        for name, losses in found.items()
    }
    whole, split = frozen_bytes(1), frozen_bytes(8)
    report.show(
        f"{len(one)} losses of the same training",
        ("way", "last loss", "largest relative difference"),
        [(name, losses[-1], differences[name]) for name, losses in found.items()],
    )
    report.show(
        "frozen weights on a device",
        ("way", "MB"),
        [("whole", whole / 1e6), ("split over 8", split / 1e6)],
    )
    report.finish(
        {
            "loss_max_difference": max(differences.values()),
            "frozen_bytes_ratio": split / whole,
        },
        given.json,
    )


if __name__ == "__main__":
    main()
