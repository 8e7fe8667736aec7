"""Training: data, step, loop, one line a logged step.

The rows of step n follow from the seed and n alone, so a training that was stopped anywhere
goes on exactly where its newest checkpoint is.
"""

import json
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from job import logs
from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.model.language_model import Forward, LanguageModel
from job.model.lora import LoraWeights, flatten, unflatten
from job.progress import Advance
from job.progress import progress as show_progress
from job.run import Run
from job.runtime import COMPILE_CLOCK
from job.spec import Train
from job.train.checkpoint import CheckpointWriter, Progress, load_checkpoint
from job.train.optimizer import make_optimizer
from job.train.step import (
    Recipe,
    StepFigures,
    TrainState,
    loss_width,
    make_train_step,
    make_validation,
    place,
)

HISTORY = "train/history.jsonl"


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


@dataclass(frozen=True)
class Plan:
    """The order of the rows: seeded, one permutation an epoch."""

    rows: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def rows_of(self, step: int) -> np.ndarray:
        """Row numbers of a step; the last step of an epoch is filled up with -1."""
        epoch, place_in_epoch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.rows)
        chosen = order[place_in_epoch * self.batch_size : (place_in_epoch + 1) * self.batch_size]
        return np.pad(chosen, (0, self.batch_size - len(chosen)), constant_values=-1)


@dataclass(frozen=True)
class Trained:
    """What training leaves."""

    lora: LoraWeights
    progress: Progress
    steps: int
    row_slots: int
    """Token slots of one step, padding counted."""
    validation_after: tuple[float, float]


class Trainer:
    """One training: its compiled functions, its state, and how far it is."""

    def __init__(
        self,
        run: Run,
        model: LanguageModel,
        rows: PackedRows,
        validation: PackedRows,
        *,
        packed: bool,
    ) -> None:
        self._run = run
        self._model = model
        self._train: Train = run.spec.train
        self._rows = rows
        self._validation = validation
        self._plan = Plan(
            len(rows.batch), self._train.batch_size, self._train.epochs, run.spec.seed
        )
        self._history: list[dict[str, Any]] = []
        start = model.lora.start(run.spec.seed)
        self._optimizer, self._schedule = make_optimizer(self._train, self._plan.steps, start)
        self._state = self._place(flatten(start), [v.value for v in self._optimizer.variables])
        forward = Forward(packed, self._train.remat)
        recipe = Recipe(
            forward,
            dropout=run.spec.model.lora.dropout,
            label_smoothing=self._train.label_smoothing,
            lora_plus_ratio=self._train.lora_plus_ratio,
            seed=run.spec.seed,
        )
        self._step = make_train_step(model, self._optimizer, recipe)
        self._validate_rows = make_validation(model, forward)
        self._losses = self._most_losses()
        self._progress = Progress()

    def _most_losses(self) -> int:
        """The width that holds the losses of a device in any part of any step."""
        groups = self._accumulation * self._model.devices
        counts = np.append(np.count_nonzero(self._rows.batch.weights, axis=1), 0)
        steps = (counts[self._plan.rows_of(step)] for step in range(self._plan.steps))
        return loss_width(max(int(step.reshape(groups, -1).sum(axis=1).max()) for step in steps))

    @property
    def _accumulation(self) -> int:
        micro = self._train.micro_batch
        return 1 if micro == "auto" else self._train.batch_size // (micro * self._model.devices)

    def _place(self, lora: list[Any], optimizer: list[Any]) -> TrainState:
        # Copied, because the step gives its state's memory away and these may be in use elsewhere.
        copied = jax.tree.map(np.array, (lora, optimizer))
        arrays, variables = self._model.replicate(copied)
        return TrainState(unflatten(arrays), tuple(variables))

    def run(self) -> Trained:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: on a signal, after a checkpoint.
            StageError: the loss or the gradient is not finite.
        """
        self._resume()
        total = self._plan.steps
        if self._progress.validation_before is None:
            self._progress.validation_before = self._validate()
            self._log_validation(self._progress.validation_before)
        with (
            CheckpointWriter(self._run.store, self._run.digests["train"]) as writer,
            show_progress("training", total, self._progress.step) as advance,
        ):
            self._loop(total, advance, writer)
        after = self._validate()
        self._log_validation(after)
        return Trained(
            lora=jax.device_get(self._state.lora),
            progress=self._progress,
            steps=total,
            row_slots=self._train.batch_size * self._rows.batch.token_ids.shape[1],
            validation_after=after,
        )

    def _resume(self) -> None:
        found = load_checkpoint(self._run.store, self._run.digests["train"])
        if found is None:
            return
        count = 2 * len(self._model.lora.targets)
        self._state = self._place(found.arrays[:count], found.arrays[count:])
        self._progress = found.progress
        lines = (self._run.store.read(HISTORY) or b"").decode().splitlines()
        self._history = [
            line for line in map(json.loads, lines) if line["step"] <= found.progress.step
        ]
        logs.get().info("resumed from a checkpoint", step=found.progress.step, of=self._plan.steps)

    def _loop(self, total: int, advance: Advance, writer: CheckpointWriter) -> None:
        train, progress = self._train, self._progress
        pending: tuple[int, Batch, StepFigures] | None = None
        mark, compiled = time.monotonic(), COMPILE_CLOCK.seconds
        while progress.step < total:
            batch = self._rows.batch.take(self._plan.rows_of(progress.step))
            placed = place(self._model, batch, self._accumulation, self._losses, progress.step)
            self._state, figures = self._step(self._state, self._model.weights, placed)
            # The step before is looked at while this one runs.
            if pending is not None:
                advance(1, **self._account(*pending))
            pending = (progress.step, batch, figures)
            progress.step += 1
            stopping = self._run.stop.requested is not None
            saving = (
                progress.step % train.checkpoint_every == 0 or progress.step == total or stopping
            )
            validating = train.validate_every and progress.step % train.validate_every == 0
            if saving or validating:
                advance(1, **self._account(*pending))
                pending = None
            progress.seconds += time.monotonic() - mark
            progress.compile_seconds += COMPILE_CLOCK.seconds - compiled
            if validating and progress.step < total:
                self._log_validation(self._validate())
            mark, compiled = time.monotonic(), COMPILE_CLOCK.seconds
            if saving:
                arrays = jax.device_get([*flatten(self._state.lora), *self._state.optimizer])
                # What the history says beyond the checkpoint is dropped on resuming.
                writer.save(progress, arrays, {HISTORY: self.history()})
            if stopping:
                writer.wait()
                self._run.stop.check()

    def _account(self, step: int, batch: Batch, figures: StepFigures) -> dict[str, float | str]:
        """Add a step's figures to the sums and, if it is due, to the history."""
        loss, correct, tokens, norm = (float(value) for value in jax.device_get(figures))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(step, loss / tokens, norm)
        progress = self._progress
        if step % self._plan.steps_per_epoch == 0:
            progress.epoch_loss = progress.epoch_correct = progress.epoch_loss_tokens = 0.0
        progress.epoch_loss += loss
        progress.epoch_correct += correct
        progress.epoch_loss_tokens += tokens
        progress.loss_tokens += int(tokens)
        progress.tokens += batch.tokens
        done = step + 1
        busy = progress.seconds - progress.compile_seconds
        rate = progress.tokens / busy if busy > 0 else 0.0
        if done % self._train.log_every == 0 or done in (1, self._plan.steps):
            line = {
                "step": done,
                "epoch": round(done / self._plan.steps_per_epoch, 4),
                "loss": loss / tokens,
                "token_accuracy": correct / tokens,
                "learning_rate": float(self._schedule(step)),
                "gradient_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
                "tokens_per_second": round(rate, 1),
            }
            self._history.append(line)
            logs.get().info("step", **{k: line[k] for k in ("step", "loss", "learning_rate")})
        return {"loss": loss / tokens, "tokens/s": round(rate)}

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        rows = self._plan.rows_of(step)
        examples = [name for row in rows if row >= 0 for name in self._rows.examples[row]]
        raise StageError(
            f"training: step {step + 1} has a loss of {loss} and a gradient norm of {norm}; its "
            f"examples are {', '.join(examples[:16])}{', ...' if len(examples) > 16 else ''}. The "
            "last good checkpoint is kept; lower train.learning_rate, or take these rows out"
        )

    def _validate(self) -> tuple[float, float]:
        """Mean loss and token accuracy over the validation rows."""
        rows, batch_size = self._validation.batch, self._model.devices * self._validation_rows
        most = np.sort(np.count_nonzero(rows.weights, axis=1))[::-1][: self._validation_rows]
        width = loss_width(int(most.sum()))
        loss = correct = 0.0
        for start in range(0, len(rows), batch_size):
            numbers = np.arange(start, min(start + batch_size, len(rows)))
            numbers = np.pad(numbers, (0, batch_size - len(numbers)), constant_values=-1)
            placed = place(self._model, rows.take(numbers), 1, width)
            sums = jax.device_get(
                self._validate_rows(self._state.lora, self._model.weights, placed)
            )
            loss, correct = loss + float(sums.loss), correct + float(sums.correct)
        tokens = float(rows.weights.sum())
        return loss / tokens, correct / tokens

    @property
    def _validation_rows(self) -> int:
        """Validation rows a device takes at once: as many as a training pass holds."""
        return max(1, self._train.batch_size // (self._accumulation * self._model.devices))

    def _log_validation(self, found: tuple[float, float]) -> None:
        line = {
            "step": self._progress.step,
            "validation_loss": found[0],
            "validation_token_accuracy": found[1],
        }
        # A training resumed after its last step measures again what is on file already.
        self._history = [
            old
            for old in self._history
            if old["step"] != line["step"] or "validation_loss" not in old
        ]
        self._history.append(line)
        logs.get().info("validation", **line)

    def history(self) -> bytes:
        """The lines of history.jsonl so far."""
        return "".join(json.dumps(line) + "\n" for line in self._history).encode()
