"""The published notebook's loop: KerasHub's task and `fit`, rows of one padded example, SGD.

Its loss covers all tokens, and it computes logits for every position.
"""

from typing import Any

LENGTH = 256
"""Tokens of a row."""


class Notebook:
    """The task with LoRA of rank 16, and the examples as the notebook feeds them."""

    def __init__(self, task: Any, examples: list[Any]) -> None:
        import keras
        import numpy as np

        self.task = task
        task.backbone.enable_lora(16)
        tokens = np.zeros((len(examples), LENGTH), np.int32)
        for row, example in enumerate(examples):
            tokens[row, : len(example.token_ids)] = example.token_ids
        mask = (tokens > 0).astype(np.int32)
        self.labels, self.weights = np.roll(tokens, -1, axis=1), np.roll(mask, -1, axis=1)
        self.weights[:, -1] = 0
        self.inputs = {"token_ids": tokens, "padding_mask": mask}
        task.compile(
            optimizer=keras.optimizers.SGD(1e-4),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        )

    def rows(self, count: int) -> tuple[dict[str, Any], Any, Any]:
        """Return inputs, labels and sample weights of the first rows."""
        inputs = {name: array[:count] for name, array in self.inputs.items()}
        return inputs, self.labels[:count], self.weights[:count]

    def fit(self, count: int, batch: int) -> float:
        """Train on the first rows once; return the mean loss."""
        import keras

        inputs, labels, weights = self.rows(count)
        # Not the KerasHub task's own method, which needs TensorFlow just for arrays.
        history = keras.Model.fit(
            self.task, inputs, labels, sample_weight=weights, batch_size=batch, epochs=1,
            shuffle=False, verbose=0,
        )  # fmt: skip
        return float(history.history["loss"][0])
