"""How many rows of a step fit into a device's memory."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from job.machine.limits import LOGITS_SLICE_BYTES, USABLE_SHARE, largest_divisor
from job.model.language_model import LanguageModel
from job.model.lora import LoraWeights, Weights
from job.train.step import Arrays, StepConfig, loss_sums

_BACKWARD_FACTOR = 1.25
"""Peak memory of a backward pass, over the activations saved for it."""


def bytes_per_device(arrays: Sequence[jax.Array]) -> int:
    """Return the bytes that arrays occupy on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def rows_that_fit(rows: int, row_bytes: int, resident_bytes: int, memory: int) -> int:
    """Return the largest divisor of `rows` whose activations fit into a device's memory.

    Args:
        rows: rows of a step on the device.
        row_bytes: bytes of activations saved for the backward pass of a row.
        resident_bytes: bytes of weights, adapter and optimizer on the device.
        memory: bytes of the device.
    """
    free = USABLE_SHARE * memory - resident_bytes - 2 * LOGITS_SLICE_BYTES
    return largest_divisor(rows, lambda n: n * row_bytes * _BACKWARD_FACTOR <= free)


def activation_bytes(
    model: LanguageModel, lora: LoraWeights, config: StepConfig, length: int, losses: int
) -> int:
    """Return the bytes of activations that a device saves for one row's backward pass.

    The loss of a row of `length` tokens and `losses` positions with a loss is traced; nothing runs.
    The weights, the adapter and the row themselves are not counted.
    """
    widths = {"token_ids": length, "segment_ids": length, "positions": losses, "targets": losses}
    rows = {name: np.zeros((1, width), np.int32) for name, width in widths.items()}
    rows |= {"weights": np.zeros((1, losses), np.float32), "micro_batch": np.zeros((), np.int32)}

    def backward(lora: LoraWeights, weights: Weights, rows: Arrays) -> Any:
        return jax.vjp(lambda lora: loss_sums(model, weights, lora, rows, config).loss, lora)[1]

    jaxpr = jax.make_jaxpr(backward)(lora, model.weights, rows).jaxpr
    inputs = {id(variable) for variable in jaxpr.invars}
    residuals: dict[int, Any] = {
        id(v): v.aval for v in jaxpr.outvars if hasattr(v, "aval") and id(v) not in inputs
    }
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in residuals.values())
