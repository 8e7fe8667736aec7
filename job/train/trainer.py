"""The training loop: load a batch, run a step, log, validate, save.

The rows of step n follow from the seed and n alone, so training interrupted at any point resumes
exactly from its newest checkpoint. `job.train.step` says how a step works.
"""

import gc
import math
import time
from dataclasses import dataclass

import jax
import numpy as np

from job.data.packing import Batch, PackedRows
from job.errors import StageError
from job.machine.devices import COMPILE_CLOCK
from job.machine.distributed import CoordinatedStop
from job.machine.limits import DeviceMemoryError, memory_errors
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import LoraWeights
from job.runtime import logs
from job.runtime.watchdog import Advance
from job.runtime.watchdog import progress as show_progress
from job.spec.schema import Train
from job.storage.base import Store
from job.train.batching import BatchLoader
from job.train.blockwise_step import make_step
from job.train.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Checkpoints,
    TrainProgress,
    Validation,
)
from job.train.metrics import HISTORY, History, model_flops_utilization
from job.train.optimizer import make_optimizer
from job.train.schedule import BatchSchedule
from job.train.state import StateNames, TrainState
from job.train.step import StepConfig, StepMetrics


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training."""

    train: Train
    seed: int
    packed: bool
    """Whether rows hold several examples."""
    dropout: float = 0.0
    """Share of the LoRA branches' inputs that is dropped."""
    folder: str = ""
    """Prefix of the files of the training in its store: empty, or ending with a slash."""
    inputs_digest: str = ""
    """Digest of everything the training depends on; checkpoints of other inputs are ignored."""


@dataclass(frozen=True)
class TrainData:
    """Rows to train and validate on, and the LoRA weights to start from."""

    rows: PackedRows
    validation: PackedRows
    initial_lora: LoraWeights


@dataclass(frozen=True)
class TrainResult:
    """A trained adapter and how training went."""

    lora: LoraWeights
    progress: TrainProgress
    validation_after: Validation
    """Validation of this adapter."""
    mfu: float | None
    files: dict[str, bytes]
    """History and TensorBoard events, by key."""


class Trainer:
    """One training: its compiled functions, its state and its progress."""

    def __init__(
        self,
        model: LanguageModel,
        data: TrainData,
        config: TrainerConfig,
        store: Store,
        stop: CoordinatedStop,
    ) -> None:
        """Build the step, which is compiled when it first runs; checkpoints go to `store`."""
        self._model = model
        self._data = data
        self._config = config
        self._store = store
        self._checkpoints = Checkpoints(store, config.folder + CHECKPOINTS, config.inputs_digest)
        self._stop = stop
        train, rows = config.train, data.rows
        lengths = tuple(rows.lengths.tolist()) if len(rows.buckets) > 1 else ()
        self.schedule = BatchSchedule(
            len(rows.batch), train.batch_size, train.epochs, config.seed, lengths
        )
        optimizer, self._learning_rate = make_optimizer(
            train, self.schedule.steps, data.initial_lora
        )
        variables = tuple(variable.value for variable in optimizer.variables)
        self._initial_state = TrainState(data.initial_lora, variables)
        self._names = StateNames(model.lora, optimizer)
        longest = max(rows.longest, data.validation.longest)
        forward = ForwardConfig(config.packed, train.remat, longest)
        step_config = StepConfig(forward, config.dropout, config.seed)
        self.train_step, self._validation_step = make_step(
            model, optimizer, step_config, train.compile
        )
        self.batches = BatchLoader(train, model, rows, self.schedule)
        self.batches.fit_to_memory(step_config, self._initial_state)
        self._reset()

    def _reset(self) -> None:
        """Go back to before the first step."""
        self._state = self._replicate(self._initial_state)
        self._best_lora = self._initial_state.lora
        self._history = History()
        self._progress = TrainProgress()

    def _replicate(self, state: TrainState) -> TrainState:
        # Copied, because a step donates its state's memory and these arrays may be used elsewhere.
        replicated: TrainState = self._model.replicate(jax.tree.map(np.array, state))
        return replicated

    def run(self) -> TrainResult:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            RunStoppedError: a stop was requested; a checkpoint was saved.
            StageError: the loss or gradient is not finite, or a row does not fit into memory.
        """
        while True:
            try:
                with memory_errors():
                    return self._train()
            except DeviceMemoryError:
                self.batches.halve_per_device_batch_size()
            # The error's traceback referred to the failed step's arrays.
            gc.collect()

    def _train(self) -> TrainResult:
        self._resume()
        progress = self._progress
        if progress.validation_before is None:
            progress.validation_before = self._validate()
        with (
            self._checkpoints,
            show_progress("training", self.schedule.steps, progress.step) as advance,
        ):
            self._loop(advance)
        if progress.validation is None or progress.validation.step != progress.step:
            self._validate()
        lora, validation = self._best_lora, progress.best
        if self._config.train.keep == "last" or validation is None:
            lora, validation = jax.device_get(self._state.lora), progress.validation
        assert validation is not None
        return TrainResult(lora, progress, validation, self._mfu(), self._files())

    def _resume(self) -> None:
        """Restore the newest checkpoint, or go back to the start if there is none."""
        self._reset()
        checkpoint = self._checkpoints.load(self._stop.processes)
        if checkpoint is None:
            return
        best = self._config.train.keep == "best"
        state, best_lora = self._names.from_arrays(checkpoint.arrays, best=best)
        self._state = self._replicate(state)
        self._best_lora = best_lora or self._best_lora
        self._progress = checkpoint.progress
        step = checkpoint.progress.step
        self._history = History(self._store.read(self._config.folder + HISTORY) or b"", step)
        logs.get().info("resumed from a checkpoint", step=step, of=self.schedule.steps)

    def _loop(self, advance: Advance) -> None:
        config, progress, processes = self._config.train, self._progress, self._stop.processes
        in_flight: tuple[int, Batch, StepMetrics] | None = None  # its metrics are not read yet
        checkpoint_due = False
        clock, compile_clock = time.monotonic(), COMPILE_CLOCK.seconds
        while progress.step < self.schedule.steps and not progress.stopped_early:
            batch, arrays = self.batches.load(progress.step, stop=self._stop.requested)
            self._state, metrics = self.train_step(self._state, self._model.weights, arrays)
            # The previous step's metrics are read while this step runs.
            stop = in_flight is not None and self._record(*in_flight, advance)
            in_flight = progress.step, batch, metrics
            progress.step += 1
            if processes.count == 1:
                stop = self._stop.requested
            checkpoint_due |= progress.step % config.checkpoint_every == 0
            # One process does not wait for slow storage: it saves once the last checkpoint is
            # written. Several do wait, because all must save at the same step.
            writable = self._checkpoints.idle or processes.count > 1
            save = stop or progress.step == self.schedule.steps or (checkpoint_due and writable)
            validate = config.validate_every and progress.step % config.validate_every == 0
            if save or validate:
                self._record(*in_flight, advance)
                in_flight = None
            progress.seconds += time.monotonic() - clock
            progress.compile_seconds += COMPILE_CLOCK.seconds - compile_clock
            if validate and not stop:
                self._validate()
            clock, compile_clock = time.monotonic(), COMPILE_CLOCK.seconds
            if save or progress.stopped_early:
                best = self._best_lora if config.keep == "best" else None
                arrays = jax.device_get(self._names.to_arrays(self._state, best))
                # The history may be ahead of the checkpoint; resuming drops the lines beyond it.
                self._checkpoints.save(Checkpoint(progress, arrays), self._files())
                checkpoint_due = False
            if stop:
                self._checkpoints.wait()
                self._stop.check()

    def _files(self) -> dict[str, bytes]:
        """Return the history and the TensorBoard events, by key."""
        files = self._history.files()
        return {self._config.folder + name: content for name, content in files.items()}

    def _record(self, step: int, batch: Batch, metrics: StepMetrics, advance: Advance) -> bool:
        """Add a step's metrics to the progress and, if due, to the history and the log.

        Returns whether a process has been told to stop.
        """
        loss, correct, tokens, norm, stop = (float(value) for value in jax.device_get(metrics))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._raise_not_finite(step, loss / tokens, norm)
        progress = self._progress
        if step % self.schedule.steps_per_epoch == 0:
            progress.epoch_loss = progress.epoch_correct = progress.epoch_loss_tokens = 0.0
        progress.epoch_loss += loss
        progress.epoch_correct += correct
        progress.epoch_loss_tokens += tokens
        progress.loss_tokens += int(tokens)
        progress.tokens += batch.tokens
        progress.padded_tokens += batch.token_ids.size
        seconds = progress.step_seconds
        throughput = progress.tokens / seconds if seconds > 0 else 0.0
        mfu = self._mfu()
        done = step + 1
        if done % self._config.train.log_every == 0 or done in (1, self.schedule.steps):
            line = {
                "epoch": round(done / self.schedule.steps_per_epoch, 4),
                "loss": loss / tokens,
                "token_accuracy": correct / tokens,
                "learning_rate": float(self._learning_rate(step)),
                "gradient_norm": norm,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 3),
                "tokens_per_second": round(throughput, 1),
                "mfu": None if mfu is None else round(mfu, 4),
            }
            self._history.add_step(done, line)
            logs.get().info(
                "step", step=done, loss=line["loss"], learning_rate=line["learning_rate"]
            )
        shown: dict[str, float | str] = {"loss": loss / tokens, "tokens/s": round(throughput)}
        advance(1, **shown if mfu is None else shown | {"MFU": f"{mfu:.1%}"})
        return stop > 0

    def _raise_not_finite(self, step: int, loss: float, norm: float) -> None:
        indices = self.schedule.batch_indices(step)
        ids = [name for row in indices if row >= 0 for name in self._data.rows.examples[row]]
        raise StageError(
            f"training: step {step + 1} has a loss of {loss} and a gradient norm of {norm}; its "
            f"examples are {', '.join(ids[:16])}{', ...' if len(ids) > 16 else ''}. The last good "
            "checkpoint is saved; lower train.learning_rate, or remove these examples"
        )

    def _validate(self) -> Validation:
        """Validate the current adapter; record the best one and whether to stop early."""
        progress, config, rows = self._progress, self._config.train, self._data.validation
        loss = correct = 0.0
        for batch in self.batches.load_validation(rows):
            sums = jax.device_get(
                self._validation_step(self._state.lora, self._model.weights, batch)
            )
            loss, correct = loss + float(sums.loss), correct + float(sums.correct)
        tokens = float(rows.batch.loss_mask.sum())
        validation = Validation(
            step=progress.step, loss=loss / tokens, token_accuracy=correct / tokens
        )
        progress.validation = validation
        if progress.best is None or validation.loss < progress.best.loss:
            progress.best, progress.validations_since_best = validation, 0
            if config.keep == "best":
                self._best_lora = jax.device_get(self._state.lora)
        else:
            progress.validations_since_best += 1
        self._history.add_validation(validation)
        logs.get().info(
            "validation",
            step=validation.step,
            validation_loss=validation.loss,
            validation_token_accuracy=validation.token_accuracy,
        )
        exhausted = (
            config.patience is not None and progress.validations_since_best >= config.patience
        )
        if exhausted and progress.step < self.schedule.steps:
            progress.stopped_early = True
            logs.get().info(
                "stopping early",
                validations_since_best=progress.validations_since_best,
                best_step=progress.best.step,
            )
        return validation

    def _mfu(self) -> float | None:
        model, devices = self._model, self._model.mesh.devices
        sizes = model.parameters, model.head_parameters
        kind = devices.flat[0].device_kind
        return model_flops_utilization(self._progress, *sizes, kind, devices.size)
