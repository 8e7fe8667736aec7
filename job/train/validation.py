"""The loss of an adapter on the validation rows."""

from collections.abc import Iterator

import jax
import numpy as np

from job.data.packing import PackedRows
from job.model.language_model import LanguageModel
from job.model.lora import LoraWeights
from job.train.batching import BatchLoader
from job.train.checkpoint import Validation
from job.train.step import Arrays, ValidationStep, padded_loss_count, shard_input


class Validator:
    """Validates adapters with the batch sizes, and so the programs, of the training steps."""

    def __init__(
        self,
        model: LanguageModel,
        rows: PackedRows,
        batches: BatchLoader,
        validation_step: ValidationStep,
    ) -> None:
        self._model = model
        self._rows = rows
        self._batches = batches
        self._validation_step = validation_step

    def validate(self, lora: LoraWeights, step: int) -> Validation:
        """Return the mean loss and token accuracy of an adapter after a step."""
        loss = correct = 0.0
        for batch in self._load_batches():
            sums = jax.device_get(self._validation_step(lora, self._model.weights, batch))
            loss, correct = loss + float(sums.loss), correct + float(sums.correct)
        tokens = float(self._rows.batch.loss_weights.sum())
        return Validation(step=step, loss=loss / tokens, token_accuracy=correct / tokens)

    def _load_batches(self) -> Iterator[Arrays]:
        rows, per_device = self._rows, self._batches.per_device_batch_size
        batch_size = self._model.devices * per_device
        counts = np.count_nonzero(rows.batch.loss_weights, axis=1)
        for length in rows.buckets:
            bucket = np.flatnonzero(rows.lengths == length)
            most = int(np.sort(counts[bucket])[::-1][:per_device].sum())
            # At least the steps' own count, so that validation shares their programs.
            losses = max(padded_loss_count(most), self._batches.loss_count(length))
            for start in range(0, len(bucket), batch_size):
                indices = bucket[start : start + batch_size]
                indices = np.pad(indices, (0, batch_size - len(indices)), constant_values=-1)
                yield shard_input(self._model, rows.batch.take(indices, length), 1, losses)
