"""Scaling: the same training on 1 to 8 devices and on 2 processes, and memory per device.

The model of the shipped smoke spec is trained briefly on each mesh, with plain SGD so that rounding
is not magnified. Reported are the largest relative difference of its losses from those of one
device, and the bytes of frozen weights on a device when they are sharded over 8. Devices are
virtual, on the CPU: this shows that the results agree, not how fast real chips are.

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
    """Return the losses of steps and validations, with `devices` divided among the processes."""
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
    """Return the most bytes of frozen weights on any of `parts` devices."""
    program = (
        "import os; os.environ['KERAS_BACKEND'] = 'jax'; import jax\n"
        "from job.model.load import load_model; from job.spec.schema import Model\n"
        f"mesh = jax.make_mesh((1, {parts}), ('data', 'model'))\n"
        "model = load_model(Model(preset='tiny', dtype='float32'), 0, mesh)\n"
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
    """Train on each mesh and print the differences."""
    given = report.arguments(__doc__ or "").parse_args()
    meshes = {
        "1 device": (1, 1, 1),
        "8 devices": (8, 1, 1),
        "8 devices, weights sharded over 4": (8, 1, 4),
        "2 processes, 4 devices each": (8, 2, 1),
    }
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, mesh) in enumerate(meshes.items()):
            losses[name] = train(Path(folder) / str(number), *mesh)
    one = losses["1 device"]
    differences = {
        name: max(abs(a - b) / abs(b) for a, b in zip(values, one, strict=True))
        for name, values in losses.items()
    }
    replicated, sharded = frozen_bytes(1), frozen_bytes(8)
    report.show(
        f"{len(one)} losses of the same training",
        ("mesh", "last loss", "largest relative difference"),
        [(name, values[-1], differences[name]) for name, values in losses.items()],
    )
    report.show(
        "frozen weights per device",
        ("weights", "MB"),
        [("replicated", replicated / 1e6), ("sharded over 8", sharded / 1e6)],
    )
    report.finish(
        {
            "loss_max_difference": max(differences.values()),
            "frozen_bytes_ratio": sharded / replicated,
        },
        given.json,
    )


if __name__ == "__main__":
    main()
