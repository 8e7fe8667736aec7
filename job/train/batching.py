"""The rows of each step as arrays on the devices, in micro-batches that fit into their memory."""

from collections.abc import Iterator

import jax
import numpy as np

from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.machine.limits import device_memory, divisors
from job.model.language_model import LanguageModel
from job.runtime import logs
from job.spec.schema import Train
from job.train.memory import activation_bytes, bytes_per_device, rows_that_fit
from job.train.schedule import BatchSchedule
from job.train.state import TrainState
from job.train.step import Arrays, StepConfig, padded_loss_count, shard_input


class BatchLoader:
    """Loads the batch of a step onto the devices."""

    def __init__(
        self, train: Train, model: LanguageModel, rows: PackedRows, schedule: BatchSchedule
    ) -> None:
        self._train = train
        self._model = model
        self._rows = rows
        self._schedule = schedule
        self._rows_per_device = train.batch_size // model.devices
        self._fixed = train.micro_batch != "auto"
        self._loss_counts: dict[tuple[int, int], int] = {}
        self.per_device_batch_size: int = (
            self._rows_per_device if train.micro_batch == "auto" else train.micro_batch
        )
        """Rows of a micro-batch on one device."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a step."""
        return self._rows_per_device // self.per_device_batch_size

    def fit_to_memory(self, config: StepConfig, state: TrainState) -> None:
        """Estimate the largest micro-batch that fits, unless the spec sets its size."""
        if self._fixed:
            return
        length = self._rows.buckets[-1]
        losses = int(np.count_nonzero(self._rows.batch.loss_mask, axis=1).max(initial=1))
        row = activation_bytes(self._model, state.lora, config, length, padded_loss_count(losses))
        resident = bytes_per_device([*self._model.weights, *jax.tree.leaves(state)])
        memory = device_memory(self._model.mesh.local_devices[0])
        size = rows_that_fit(self._rows_per_device, row, resident, memory)
        self.per_device_batch_size = size
        logs.get().info(
            "per-device batch size estimated",
            per_device_batch_size=size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            estimate_mb=round((resident + size * row) / 1e6),
            memory_mb=round(memory / 1e6),
        )

    def halve_per_device_batch_size(self) -> None:
        """Halve the micro-batch, or take the next smaller divisor, and accumulate more.

        Raises:
            StageError: the spec sets its size, or it is a single row already.
        """
        size = self.per_device_batch_size
        if self._fixed or size == 1:
            advice = "lower train.micro_batch or set it to auto; " if size > 1 else ""
            raise StageError(
                f"training: {size} row{'s' if size > 1 else ''} of "
                f"{self._rows.buckets[-1]} tokens do not fit into a device's memory; {advice}"
                "set train.remat to blocks, lower train.max_length and train.pack_length, or "
                "shard the weights with runtime.mesh.model"
            )
        smaller = next(n for n in divisors(self._rows_per_device) if n <= size // 2)
        self.per_device_batch_size = smaller
        logs.get().warning(
            "out of memory: smaller micro-batches", per_device_batch_size=smaller, before=size
        )

    def load(self, step: int, *, stop: bool = False) -> tuple[Batch, Arrays]:
        """Return the rows of a step, on the host and as the compiled step takes them.

        Args:
            step: number of the step.
            stop: whether this process has been told to stop.
        """
        indices = self._schedule.batch_indices(step)
        length = self._length(indices)
        batch = self._rows.batch.take(indices, length)
        count, losses = self.gradient_accumulation_steps, self.loss_count(length)
        return batch, shard_input(self._model, batch, count, losses, step, stop=stop)

    def load_validation(self, rows: PackedRows) -> Iterator[Arrays]:
        """Yield the batches of validation rows, of the sizes and so the programs of the steps."""
        batch_size = self._model.devices * self.per_device_batch_size
        counts = np.count_nonzero(rows.batch.loss_mask, axis=1)
        for length in rows.buckets:
            bucket = np.flatnonzero(rows.lengths == length)
            most = int(np.sort(counts[bucket])[::-1][: self.per_device_batch_size].sum())
            # At least the steps' own count, so that validation shares their programs.
            losses = max(padded_loss_count(most), self.loss_count(length))
            for start in range(0, len(bucket), batch_size):
                indices = bucket[start : start + batch_size]
                indices = np.pad(indices, (0, batch_size - len(indices)), constant_values=-1)
                yield shard_input(self._model, rows.batch.take(indices, length), 1, losses)

    def loss_count(self, length: int) -> int:
        """Return the length of a device's list of loss positions, for every step of this length.

        It holds the losses of any micro-batch of any such step, so these share one program.
        """
        key = (self.per_device_batch_size, length)
        if key not in self._loss_counts:
            groups = self.gradient_accumulation_steps * self._model.devices
            counts = np.append(np.count_nonzero(self._rows.batch.loss_mask, axis=1), 0)
            steps = map(self._schedule.batch_indices, range(self._schedule.steps))
            most = (
                int(counts[indices].reshape(groups, -1).sum(axis=1).max())
                for indices in steps
                if self._length(indices) == length
            )
            self._loss_counts[key] = padded_loss_count(max(most, default=1))
        return self._loss_counts[key]

    def _length(self, indices: np.ndarray) -> int:
        """Return the bucket length of a step: that of its longest row."""
        return int(self._rows.lengths[indices[indices >= 0]].max())
