"""The Keras optimizer of the spec, and the learning rate over the steps."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from job.model.lora import LoraWeights, flatten_lora
from job.spec.schema import Train


@keras.saving.register_keras_serializable(package="job")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Linear warm-up to the peak, then constant, linear or cosine down to 0.

    Step 0 of a warm-up of n steps has 1/n of the peak: no step is wasted at a rate of 0.
    The cosine is that of Loshchilov & Hutter 2016 (SGDR), without restarts.
    """

    def __init__(self, peak: float, shape: str, warmup: int, steps: int) -> None:
        self.peak = peak
        self.shape = shape
        self.warmup = warmup
        self.steps = steps

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        rising = (step + 1.0) / max(self.warmup, 1)
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        done = ops.clip(done, 0.0, 1.0)
        if self.shape == "linear":
            falling = 1.0 - done
        elif self.shape == "cosine":
            falling = 0.5 * (1.0 + ops.cos(math.pi * done))
        else:
            falling = ops.ones_like(done)
        return self.peak * ops.where(step < self.warmup, rising, falling)

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "shape": self.shape, "warmup": self.warmup, "steps": self.steps}


_OPTIMIZERS: dict[str, Callable[[WarmupSchedule, Train], Any]] = {
    "sgd": lambda rate, train: keras.optimizers.SGD(rate, global_clipnorm=train.clip_norm),
    "adamw": lambda rate, train: keras.optimizers.AdamW(
        rate, weight_decay=train.weight_decay, global_clipnorm=train.clip_norm
    ),
    "lion": lambda rate, train: keras.optimizers.Lion(
        rate, weight_decay=train.weight_decay, global_clipnorm=train.clip_norm
    ),
    "adafactor": lambda rate, train: keras.optimizers.Adafactor(
        rate,
        relative_step=False,  # the schedule is the spec's
        weight_decay=train.weight_decay,
        global_clipnorm=train.clip_norm,
    ),
    "muon": lambda rate, train: keras.optimizers.Muon(
        rate,
        weight_decay=train.weight_decay,
        adam_weight_decay=train.weight_decay,
        global_clipnorm=train.clip_norm,
    ),
}


def make_optimizer(train: Train, steps: int, lora: LoraWeights) -> tuple[Any, WarmupSchedule]:
    """The optimizer, built for the adapter's weights, and its schedule over `steps` steps."""
    schedule = WarmupSchedule(
        train.learning_rate, train.schedule, math.ceil(train.warmup_ratio * steps), steps
    )
    optimizer = _OPTIMIZERS[train.optimizer](schedule, train)
    optimizer.build([keras.Variable(array, dtype="float32") for array in flatten_lora(lora)])
    return optimizer, schedule
