"""Training metrics: the history file, the same as TensorBoard events, throughput and MFU.

`tensorboard --logdir` on their folder shows the events, also during training: the file is
rewritten from the history with each checkpoint, and grows. TensorFlow is not needed.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from job.machine import accelerators
from job.train.checkpoint import Validation

HISTORY = "history.jsonl"
EVENTS = "tensorboard/events.out.tfevents.0000000000.job"

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
"""TensorBoard tag of each key of the history."""


class History:
    """The logged steps and validations of a training, one dictionary a line."""

    def __init__(self, content: bytes = b"", last_step: int = 0) -> None:
        """Resume an earlier history file, without its lines after `last_step`."""
        lines = map(json.loads, content.decode().splitlines())
        self.lines: list[dict[str, Any]] = [line for line in lines if line["step"] <= last_step]

    def add_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of a step."""
        self.lines.append({"step": step, "time": round(time.time(), 3), **metrics})

    def add_validation(self, validation: Validation) -> None:
        """Add a validation; it replaces an earlier one after the same step."""
        step = validation.step
        self.lines = [
            line for line in self.lines if line["step"] != step or "validation_loss" not in line
        ]
        metrics = {
            "validation_loss": validation.loss,
            "validation_token_accuracy": validation.token_accuracy,
        }
        self.add_step(step, metrics)

    def files(self) -> dict[str, bytes]:
        """Return the history and the TensorBoard events as files, by name."""
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        return {HISTORY: text.encode(), EVENTS: event_file(self.lines)}


def event_file(history: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the lines of a history as TensorBoard events, with their times."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="job-events-") as folder:
        with SummaryWriter(folder) as writer:
            for line in history:
                for key, tag in _TAGS.items():
                    if line.get(key) is not None:
                        writer.add_scalar(tag, line[key], line["step"], line["time"])
        (path,) = Path(folder).iterdir()
        return path.read_bytes()


def training_flops(
    block_parameters: int, head_parameters: int, tokens: int, loss_tokens: int
) -> float:
    """Return the FLOPs that training a LoRA adapter needs: 4 a parameter and token.

    Frozen kernels have no gradient of their own, so the usual 6 (Kaplan et al. 2020) becomes 4.

    Args:
        block_parameters: parameters of the model without its output projection.
        head_parameters: parameters of the output projection, applied to loss tokens only.
        tokens: tokens without padding.
        loss_tokens: tokens with a loss.
    """
    return 4.0 * (block_parameters * tokens + head_parameters * loss_tokens)


def model_flops_utilization(
    flops: float, seconds: float, device_kind: str, devices: int
) -> float | None:
    """Return the MFU, from 0 to 1; None if the device's peak is unknown."""
    accelerator = accelerators.find_accelerator(device_kind)
    if accelerator is None or accelerator.peak_flops is None or seconds <= 0:
        return None
    return flops / (seconds * devices * accelerator.peak_flops)
