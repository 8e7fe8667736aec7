"""Training: data, step, loop, one line a logged step.

The rows of step n follow from the seed and n alone, so a training that was stopped anywhere
goes on exactly where its newest checkpoint is.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.machine.devices import COMPILE_CLOCK
from job.machine.distributed import CoordinatedStop
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import LoraWeights, flatten_lora, unflatten_lora
from job.runtime import logs
from job.runtime.watchdog import Advance
from job.runtime.watchdog import progress as show_progress
from job.spec.schema import Train
from job.storage.base import Store
from job.train.batching import BatchSchedule, DeviceMemoryError, StepBatches, memory_errors
from job.train.blockwise_step import make_step
from job.train.checkpoint import (
    CheckpointWriter,
    TrainProgress,
    Validation,
    newest_step,
    read_checkpoint,
)
from job.train.metrics import EVENTS, event_file, training_flops, utilization
from job.train.optimizer import make_optimizer
from job.train.step import StepConfig, StepMetrics, TrainState, padded_loss_count, shard_input

HISTORY = "train/history.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What training leaves."""

    lora: LoraWeights
    progress: TrainProgress
    validation_after: Validation
    """Of the adapter that is kept."""
    mfu: float | None


@dataclass(frozen=True)
class TrainerConfig:
    """What a training does, besides the model and its rows."""

    train: Train
    seed: int
    packed: bool
    """Rows hold several examples."""
    dropout: float = 0.0
    """Share of the adapters' inputs that is dropped."""
    inputs: str = ""
    """Digest of everything the training depends on; checkpoints of other inputs are ignored."""


class Trainer:
    """One training: its compiled functions, its state, and its progress."""

    def __init__(
        self,
        model: LanguageModel,
        rows: PackedRows,
        validation: PackedRows,
        start: LoraWeights,
        config: TrainerConfig,
        store: Store,
        stop: CoordinatedStop,
    ) -> None:
        """Build the compiled step and set the state to that before the first step.

        Args:
            model: the frozen model.
            rows: the training rows.
            validation: the validation rows.
            start: the adapter to start from.
            config: settings of the training.
            store: holds checkpoints and the history.
            stop: checked at each step.
        """
        self._model = model
        self._config = config
        self._train = config.train
        self._rows = rows
        self._validation = validation
        self._store = store
        self._stop = stop
        self._plan = BatchSchedule(
            len(rows.batch),
            self._train.batch_size,
            self._train.epochs,
            config.seed,
            tuple(rows.lengths.tolist()) if len(rows.buckets) > 1 else (),
        )
        self._optimizer, self._schedule = make_optimizer(self._train, self._plan.steps, start)
        self._start = flatten_lora(start), [v.value for v in self._optimizer.variables]
        reach = max(rows.longest, validation.longest)
        forward = ForwardConfig(config.packed, self._train.remat, reach)
        recipe = StepConfig(
            forward,
            dropout=config.dropout,
            label_smoothing=self._train.label_smoothing,
            lora_plus_ratio=self._train.lora_plus_ratio,
            seed=config.seed,
        )
        self._step, self._validate_rows = make_step(
            model, self._optimizer, recipe, self._train.compile
        )
        state = [*self._start[0], *self._start[1]]
        self._portions = StepBatches(self._train, model, rows, self._plan, recipe, state)
        self._begin()

    def _begin(self) -> None:
        """Set the state to that before the first step."""
        self._state = self._place(*self._start)
        self._best = self._start[0]
        self._history: list[dict[str, Any]] = []
        self._progress = TrainProgress()

    def _place(self, lora: Sequence[Any], optimizer: Sequence[Any]) -> TrainState:
        # Copied, because the step gives its state's memory away and these may be in use elsewhere.
        copied = jax.tree.map(np.array, (list(lora), list(optimizer)))
        arrays, variables = self._model.replicate(copied)
        return TrainState(unflatten_lora(arrays), tuple(variables))

    def trace_first(self) -> Callable[[], None]:
        """Trace the first step; what is returned compiles it, on any thread."""
        _, placed = self._portions.take(0)
        traced = self._step.lower(self._state, self._model.weights, placed)

        def compile_step() -> None:
            traced.compile()

        return compile_step

    def run(self) -> TrainResult:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: on a signal, after a checkpoint.
            StageError: the loss or the gradient is not finite, or a row does not fit into memory.
        """
        while True:
            try:
                with memory_errors():
                    return self._run_through()
            except DeviceMemoryError:
                self._portions.halve()
            # What the step held is still in its frames, which the error referred to.
            gc.collect()

    def _run_through(self) -> TrainResult:
        self._resume()
        total, progress = self._plan.steps, self._progress
        if progress.validation_before is None:
            progress.validation_before = self._validate()
        with (
            CheckpointWriter(self._store, self._config.inputs) as writer,
            show_progress("training", total, progress.step) as advance,
        ):
            if not progress.stopped:
                self._loop(total, advance, writer)
        if progress.validation is None or progress.validation.step != progress.step:
            self._validate()
        lora, after = unflatten_lora(self._best), progress.best
        if self._train.keep == "last" or after is None:
            lora, after = jax.device_get(self._state.lora), progress.validation
        assert after is not None
        return TrainResult(lora, progress, after, self.utilization())

    def _resume(self) -> None:
        """Go to the newest checkpoint, or to the start where there is none."""
        self._begin()
        newest = self._stop.processes.broadcast(
            lambda: json.dumps(newest_step(self._store, self._config.inputs))
        )
        step = json.loads(newest)
        if step is None:
            return
        found = read_checkpoint(self._store, step)
        count = 2 * len(self._model.lora.targets)
        kept = len(found.arrays) - (count if self._train.keep == "best" else 0)
        self._state = self._place(found.arrays[:count], found.arrays[count:kept])
        self._best = found.arrays[kept:]
        self._progress = found.progress
        lines = (self._store.read(HISTORY) or b"").decode().splitlines()
        self._history = [
            line for line in map(json.loads, lines) if line["step"] <= found.progress.step
        ]
        logs.get().info("resumed from a checkpoint", step=step, of=self._plan.steps)

    def _loop(self, total: int, advance: Advance, writer: CheckpointWriter) -> None:
        train, progress = self._train, self._progress
        pending: _Pending | None = None
        mark, compiled = time.monotonic(), COMPILE_CLOCK.seconds
        due = False
        while progress.step < total and not progress.stopped:
            batch, placed = self._portions.take(progress.step, stop=self._stop.requested)
            self._state, figures = self._step(self._state, self._model.weights, placed)
            # The step before is looked at while this one runs.
            stopping = pending is not None and self._account(pending, advance)
            pending = _Pending(progress.step, batch, figures)
            progress.step += 1
            if self._stop.processes.count == 1:
                stopping = self._stop.requested
            due = due or progress.step % train.checkpoint_every == 0
            # Steps do not wait for slow storage: the checkpoint is made once the last is written.
            # Several processes do, because all must save at the same step.
            ready = writer.idle or self._stop.processes.count > 1
            saving = stopping or progress.step == total or (due and ready)
            validating = train.validate_every and progress.step % train.validate_every == 0
            if saving or validating:
                self._account(pending, advance)
                pending = None
            progress.seconds += time.monotonic() - mark
            progress.compile_seconds += COMPILE_CLOCK.seconds - compiled
            if validating and not stopping:
                self._validate()
            mark, compiled = time.monotonic(), COMPILE_CLOCK.seconds
            if saving or progress.stopped:
                self._save(writer)
                due = False
            if stopping:
                writer.wait()
                self._stop.check()

    def _save(self, writer: CheckpointWriter) -> None:
        state = [*flatten_lora(self._state.lora), *self._state.optimizer]
        best = self._best if self._train.keep == "best" else []
        # What the history says beyond the checkpoint is dropped on resuming.
        writer.save(self._progress, [*jax.device_get(state), *best], self.curves())

    def _account(self, pending: "_Pending", advance: Advance) -> bool:
        """Add a step's figures to the sums and, if it is due, to the history.

        Returns:
            Whether a process wants to stop.
        """
        step, batch, figures = pending
        loss, correct, tokens, norm, stop = (float(value) for value in jax.device_get(figures))
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
        progress.slots += batch.token_ids.size
        done = step + 1
        rate = progress.tokens / progress.busy if progress.busy > 0 else 0.0
        mfu = self.utilization()
        if done % self._train.log_every == 0 or done in (1, self._plan.steps):
            line = {
                "step": done,
                "time": round(time.time(), 3),
                "epoch": round(done / self._plan.steps_per_epoch, 4),
                "loss": loss / tokens,
                "token_accuracy": correct / tokens,
                "learning_rate": float(self._schedule(step)),
                "gradient_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
                "tokens_per_second": round(rate, 1),
                "mfu": None if mfu is None else round(mfu, 4),
            }
            self._history.append(line)
            logs.get().info("step", **{k: line[k] for k in ("step", "loss", "learning_rate")})
        shown = {"loss": loss / tokens, "tokens/s": round(rate)}
        advance(1, **shown if mfu is None else shown | {"MFU": f"{mfu:.1%}"})
        return stop > 0

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        rows = self._plan.batch_indices(step)
        examples = [name for row in rows if row >= 0 for name in self._rows.examples[row]]
        raise StageError(
            f"training: step {step + 1} has a loss of {loss} and a gradient norm of {norm}; its "
            f"examples are {', '.join(examples[:16])}{', ...' if len(examples) > 16 else ''}. The "
            "last good checkpoint is kept; lower train.learning_rate, or take these rows out"
        )

    def _validate(self) -> Validation:
        """Measure the adapter on the validation rows, and remember it if it is the best."""
        batch, lengths = self._validation.batch, self._validation.lengths
        each = self._portions.at_once
        at_once = self._model.devices * each
        counts = np.count_nonzero(batch.weights, axis=1)
        loss = correct = 0.0
        for length in self._validation.buckets:
            alike = np.flatnonzero(lengths == length)
            width = padded_loss_count(int(np.sort(counts[alike])[::-1][:each].sum()))
            # The same programs as the steps', where these have rows of the length.
            width = max(width, self._portions.width(length))
            for start in range(0, len(alike), at_once):
                rows = alike[start : start + at_once]
                rows = np.pad(rows, (0, at_once - len(rows)), constant_values=-1)
                placed = shard_input(self._model, batch.take(rows, length), 1, width)
                sums = jax.device_get(
                    self._validate_rows(self._state.lora, self._model.weights, placed)
                )
                loss, correct = loss + float(sums.loss), correct + float(sums.correct)
        tokens = float(batch.weights.sum())
        found = Validation(
            step=self._progress.step, loss=loss / tokens, token_accuracy=correct / tokens
        )
        self._consider(found)
        return found

    def _consider(self, found: Validation) -> None:
        """Note a validation: in the history, as the best, as a reason to stop."""
        progress, train = self._progress, self._train
        progress.validation = found
        if progress.best is None or found.loss < progress.best.loss:
            progress.best, progress.stale = found, 0
            if train.keep == "best":
                self._best = jax.device_get(flatten_lora(self._state.lora))
        else:
            progress.stale += 1
        line = {
            "step": found.step,
            "time": round(time.time(), 3),
            "validation_loss": found.loss,
            "validation_token_accuracy": found.token_accuracy,
        }
        # A training resumed after its last step measures again what is on file already.
        self._history = [
            old
            for old in self._history
            if old["step"] != found.step or "validation_loss" not in old
        ]
        self._history.append(line)
        logs.get().info("validation", **{k: line[k] for k in line if k != "time"})
        enough = train.patience is not None and progress.stale >= train.patience
        if enough and progress.step < self._plan.steps:
            progress.stopped = True
            logs.get().info(
                "no better validation: stopping early",
                validations=progress.stale,
                best_step=progress.best.step,
            )

    def utilization(self) -> float | None:
        """MFU so far; see `job.train.metrics`."""
        model, progress = self._model, self._progress
        body = model.parameters - model.head_parameters
        needed = training_flops(body, model.head_parameters, progress.tokens, progress.loss_tokens)
        devices = model.mesh.devices
        return utilization(needed, progress.busy, devices.flat[0].device_kind, devices.size)

    def curves(self) -> dict[str, bytes]:
        """The files that show how training went so far, by key."""
        lines = "".join(json.dumps(line) + "\n" for line in self._history)
        return {HISTORY: lines.encode(), EVENTS: event_file(self._history)}


class _Pending(NamedTuple):
    """A step that was begun and is not accounted for yet."""

    step: int
    batch: Batch
    figures: StepMetrics
