"""The curves of a training as a TensorBoard event file, without TensorFlow.

`tensorboard --logdir <run>/train/tensorboard` shows it, also while the run goes on: the file is
made anew from the history with each checkpoint, and grows.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from job.machine import accelerators

EVENTS = "train/tensorboard/events.out.tfevents.0000000000.job"


_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "token_accuracy": "token_accuracy/train",
    "validation_token_accuracy": "token_accuracy/validation",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
}
"""What a key of the history is called in TensorBoard."""


def event_file(history: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines of the history as events, in their order and with their times."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="job-events-") as folder:
        with SummaryWriter(folder) as writer:
            for line in history:
                for key, tag in _TAGS.items():
                    if line.get(key) is not None:
                        writer.add_scalar(tag, line[key], line["step"], line["time"])
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def training_flops(body: int, head: int, tokens: int, loss_tokens: int) -> float:
    """FLOPs that training an adapter needs.

    Args:
        body: parameters of the blocks; the head's are
        head: vocabulary times width.
        tokens: without padding.
        loss_tokens: those that have a loss.
    """
    return 4.0 * (body * tokens + head * loss_tokens)


def utilization(flops: float, seconds: float, device_kind: str, devices: int) -> float | None:
    """MFU, between 0 and 1; None where the peak of the device is not known."""
    found = accelerators.find_accelerator(device_kind)
    if found is None or found.peak_flops is None or seconds <= 0:
        return None
    return flops / (seconds * devices * found.peak_flops)
