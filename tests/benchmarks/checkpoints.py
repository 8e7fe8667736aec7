"""What checkpoints cost: training that saves many of them against training that saves one.

The same training runs in turn with a checkpoint every few steps and with only the last one, each
into a bucket on loopback that another process serves. The adapter is wide, so that a checkpoint is
as large as that of Gemma 3 1B at rank 16. Seconds are training without compilation, including the
last checkpoint and any wait of the loop. On the CPU, writing competes with the step for cores; on
an accelerator, steps continue meanwhile.

    uv run python -m tests.benchmarks.checkpoints [--every 10] [--json FILE]
"""

import os
import subprocess
import sys

from tests.benchmarks import report
from tests.benchmarks.shapes import SHAPES, make_model
from tests.benchmarks.train_speed import make_examples

os.environ["KERAS_BACKEND"] = "jax"

SERVE = """
import sys
from tests.services.bucket import Bucket
with Bucket("checkpoints") as bucket:
    print(bucket.url, flush=True)
    sys.stdin.read()
"""


def main() -> None:
    """Train with and without frequent checkpoints and print what they cost."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest one counts")
    parser.add_argument("--rank", type=int, default=192)
    given = parser.parse_args()

    from job.data.packing import make_rows
    from job.machine.distributed import CoordinatedStop, ProcessGroup
    from job.runtime.signals import StopSignal
    from job.spec.schema import Train
    from job.storage.locations import open_store
    from job.train.checkpoint import CHECKPOINTS
    from job.train.trainer import TrainData, Trainer, TrainerConfig

    model = make_model("proxy", "float32", given.rank)
    examples = make_examples(given.examples, SHAPES["proxy"]["vocabulary_size"])
    rows = make_rows(examples, 512, packing=True)
    held_out = make_rows(examples[:2], 512, packing=True)

    def train(name: str, every: int) -> tuple[float, int]:
        """Return seconds per step, and bytes of the newest checkpoint."""
        settings = Train(batch_size=1, checkpoint_every=every, log_every=10**6)
        store = open_store(f"gs://checkpoints/{name}")
        config = TrainerConfig(settings, seed=0, packed=True, inputs_digest=name)
        stop = CoordinatedStop(StopSignal(), ProcessGroup())
        data = TrainData(rows, held_out, model.lora.init(0))
        progress = Trainer(model, data, config, store, stop).run().progress
        newest = store.stat(store.list(CHECKPOINTS)[-1])
        assert newest is not None
        return progress.step_seconds / progress.step, newest.bytes

    with (
        subprocess.Popen(
            [sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdout is not None
        os.environ["STORAGE_EMULATOR_HOST"] = server.stdout.readline().strip()
        never, often, size = [], [], 0
        for number in range(given.repeats):
            never.append(train(f"never-{number}", 10**9)[0])
            seconds, size = train(f"often-{number}", given.every)
            often.append(seconds)
        server.communicate()
    report.show(
        f"proxy, rank {given.rank}, checkpoints of {size / 1e6:.1f} MB into a bucket",
        ("checkpoints", "seconds a step"),
        [("at the end", min(never)), (f"every {given.every} steps", min(often))],
    )
    report.finish({"stall": min(often) / min(never) - 1, "checkpoint_mb": size / 1e6}, given.json)


if __name__ == "__main__":
    main()
