"""The Keras optimizer of a spec and its learning-rate schedule."""

import math
from typing import Any

import keras
from keras import ops

from job.model.lora import LoraWeights, flatten_lora
from job.spec.schema import Train


class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Linear warm-up to the peak rate, then a constant, linear or cosine schedule.

    Step 0 of an n-step warm-up already has 1/n of the peak, so no step is wasted at a rate of 0.
    Cosine is that of Loshchilov & Hutter 2016 (SGDR), without restarts.
    """

    def __init__(self, peak: float, shape: str, warmup: int, steps: int) -> None:
        self.peak = peak
        self.shape = shape
        self.warmup = warmup
        self.steps = steps

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        warm = (step + 1.0) / max(self.warmup, 1)
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        progress = ops.clip(progress, 0.0, 1.0)
        if self.shape == "linear":
            decay = 1.0 - progress
        elif self.shape == "cosine":
            decay = 0.5 * (1.0 + ops.cos(math.pi * progress))
        else:
            decay = ops.ones_like(progress)
        return self.peak * ops.where(step < self.warmup, warm, decay)


def make_optimizer(train: Train, steps: int, lora: LoraWeights) -> tuple[Any, WarmupSchedule]:
    """Return the optimizer, built for the LoRA weights, and its schedule over `steps` steps."""
    schedule = WarmupSchedule(
        train.learning_rate, train.schedule, math.ceil(train.warmup_ratio * steps), steps
    )
    kinds = {
        "sgd": keras.optimizers.SGD,
        "adamw": keras.optimizers.AdamW,
        "lion": keras.optimizers.Lion,
    }
    decay = {} if train.optimizer == "sgd" else {"weight_decay": train.weight_decay}
    optimizer = kinds[train.optimizer](schedule, global_clipnorm=train.clip_norm, **decay)
    # The names appear in the optimizer's variable paths, from which checkpoints name them.
    parameters = [
        keras.Variable(array, dtype="float32", name=f"lora_{number}")
        for number, array in enumerate(flatten_lora(lora))
    ]
    optimizer.build(parameters)
    return optimizer, schedule
