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

from job.machine.accelerators import find_accelerator
from job.train.checkpoint import TrainProgress, Validation

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


def model_flops_utilization(
    progress: TrainProgress, parameters: int, head_parameters: int, device_kind: str, devices: int
) -> float | None:
    """Return the MFU of a training, from 0 to 1; None if the device's peak is unknown.

    A LoRA adapter needs 4 FLOPs a parameter and token: frozen kernels have no gradient of their
    own, so the usual 6 (Kaplan et al. 2020) becomes 4. The head is applied to loss tokens only.

    Args:
        parameters: of the model.
        head_parameters: of these, the output projection's.
    """
    accelerator, seconds = find_accelerator(device_kind), progress.step_seconds
    if accelerator is None or accelerator.peak_flops is None or seconds <= 0:
        return None
    blocks = (parameters - head_parameters) * progress.tokens
    flops = 4.0 * (blocks + head_parameters * progress.loss_tokens)
    return flops / (seconds * devices * accelerator.peak_flops)
