"""Training lowers the loss, resumes exactly where it was interrupted, and stops when it fails."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from job.errors import RunStoppedError, StageError
from job.machine.distributed import ProcessGroup
from job.model.language_model import LanguageModel
from job.model.lora import flatten_lora
from job.storage.local import LocalStore
from job.train.checkpoint import CHECKPOINTS
from job.train.memory import rows_that_fit
from job.train.metrics import HISTORY
from job.train.trainer import TrainResult
from tests.train.small import before_step, checkpoints_in, make_trainer

SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.3}


def values(result: TrainResult) -> list[np.ndarray]:
    return [np.asarray(array) for array in flatten_lora(result.lora)]


def history(result: TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.files[HISTORY].splitlines()]


def assert_same_bytes(ours: TrainResult, theirs: TrainResult) -> None:
    for a, b in zip(values(ours), values(theirs), strict=True):
        assert a.tobytes() == b.tobytes()


def assert_close(ours: TrainResult, theirs: TrainResult) -> None:
    for a, b in zip(values(ours), values(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def improvement(result: TrainResult) -> float:
    before = result.progress.validation_before
    assert before is not None
    return before.loss - result.validation_after.loss


def test_loss_falls_and_the_history_has_every_step(tmp_path: Path, small: LanguageModel) -> None:
    result = make_trainer(tmp_path, small, validate_every=3)[0].run()
    lines = history(result)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6, 9]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert improvement(result) > 0.5
    epoch = [line["loss"] for line in steps if line["step"] > 6]
    mean = result.progress.epoch_loss / result.progress.epoch_loss_tokens
    assert min(epoch) < mean < max(epoch)


def test_learning_rate_zero_changes_nothing(tmp_path: Path, small: LanguageModel) -> None:
    result = make_trainer(tmp_path, small, learning_rate=0, epochs=1)[0].run()
    for array, initial in zip(values(result), flatten_lora(small.lora.init(0)), strict=True):
        np.testing.assert_array_equal(array, initial)
    assert improvement(result) == 0


class SlowStore(LocalStore):
    """A store that does not write checkpoints until `ready`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ready = threading.Event()
        self.written: list[str] = []

    def write(self, key: str, content: bytes) -> None:
        if key.startswith(CHECKPOINTS):
            assert self.ready.wait(60), "steps wait for a checkpoint"
            self.written.append(key)
        super().write(key, content)


def test_steps_do_not_wait_for_slow_storage(tmp_path: Path, small: LanguageModel) -> None:
    store = SlowStore(tmp_path)
    trainer, _ = make_trainer(tmp_path, small, store, checkpoint_every=2)
    last = trainer.schedule.steps
    before_step(trainer, lambda call, _: store.ready.set() if call == last else None)
    assert trainer.run().progress.step == 9
    assert [Path(key).name[:13] for key in store.written] == ["step-00000002", "step-00000009"]


@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({}, (1, 5, 8)),
        pytest.param({"compile": "step", "micro_batch": 2}, (4,), marks=pytest.mark.slow),
    ],
    ids=["blocks", "step, accumulated"],
)
def test_interrupted_training_ends_with_the_same_adapter(
    tmp_path: Path, small: LanguageModel, trained: TrainResult,
    settings: dict[str, Any], stops: tuple[int, ...],
) -> None:  # fmt: skip
    expected = trained
    if settings:
        expected = make_trainer(tmp_path / "expected", small, **settings)[0].run()
    store = LocalStore(tmp_path / "interrupted")
    trainer, stop = make_trainer(tmp_path, small, store, **settings)

    def interrupt(call: int, _: Any) -> None:
        stop.requested = "SIGTERM" if call in stops else None

    before_step(trainer, interrupt)
    for step in stops:
        with pytest.raises(RunStoppedError):
            trainer.run()
        checkpoint = checkpoints_in(store).load(ProcessGroup())
        assert checkpoint is not None
        assert checkpoint.progress.step == step
    resumed = make_trainer(tmp_path, small, store, **settings)[0].run()
    assert_same_bytes(resumed, expected)
    assert resumed.progress.tokens == expected.progress.tokens
    assert resumed.progress.epoch_loss == pytest.approx(expected.progress.epoch_loss)
    saved = [json.loads(line) for line in (store.read(HISTORY) or b"").splitlines()]
    assert [line["step"] for line in saved if "loss" in line] == list(range(1, 10))


def test_a_loss_that_is_not_finite_stops_and_names_examples(
    tmp_path: Path, small: LanguageModel
) -> None:
    trainer, _ = make_trainer(tmp_path, small, checkpoint_every=1)
    step, calls = trainer.train_step, 0

    def poisoned(state: Any, weights: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            nan = jax.numpy.nan
            weights = tuple(jax.numpy.full_like(w, nan) if w.ndim > 1 else w for w in weights)
        return step(state, weights, batch)

    trainer.train_step = poisoned
    with pytest.raises(StageError, match=r"step 3 has a loss of nan.*examples are \d+, \d+"):
        trainer.run()
    checkpoint = checkpoints_in(LocalStore(tmp_path)).load(ProcessGroup())
    assert checkpoint is not None
    assert checkpoint.progress.step in (1, 2)  # the second waits while the first is written
    assert all(np.isfinite(array).all() for array in checkpoint.arrays.values())


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.3), ("lion", 1e-2)])
def test_every_optimizer_lowers_the_loss(
    tmp_path: Path, small: LanguageModel, optimizer: str, rate: float
) -> None:
    trainer, _ = make_trainer(tmp_path, small, optimizer=optimizer, learning_rate=rate)
    assert improvement(trainer.run()) > 0.1


def test_resuming_after_the_last_step_ends_the_same(tmp_path: Path, small: LanguageModel) -> None:
    def without_times(result: TrainResult) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "time"} for line in history(result)]

    trainer, _ = make_trainer(tmp_path, small, epochs=1)
    first = trainer.run()
    LocalStore(tmp_path).write(HISTORY, first.files[HISTORY])
    again = trainer.run()
    assert_same_bytes(again, first)
    assert without_times(again) == without_times(first)


def test_smaller_micro_batches_give_the_same_training(
    tmp_path: Path, small: LanguageModel, trained_by_sgd: TrainResult
) -> None:
    assert_close(make_trainer(tmp_path, small, **SGD, micro_batch=1)[0].run(), trained_by_sgd)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_out_of_memory_halves_the_batch_and_continues(
    tmp_path: Path, small: LanguageModel, trained_by_sgd: TrainResult, checkpoint_every: int
) -> None:
    trainer, _ = make_trainer(tmp_path, small, **SGD, checkpoint_every=checkpoint_every)
    assert trainer.batches.per_device_batch_size == 4
    step, calls = trainer.train_step, 0

    def full(state: Any, weights: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2 and batch["token_ids"].shape[1] > 1:
            # As on a device: the donated memory is gone.
            jax.tree.map(lambda array: array.delete(), state)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return step(state, weights, batch)

    trainer.train_step = full
    result = trainer.run()
    assert trainer.batches.per_device_batch_size == 1
    assert trainer.batches.gradient_accumulation_steps == 4
    assert result.progress.tokens == trained_by_sgd.progress.tokens
    assert_close(result, trained_by_sgd)


@pytest.mark.parametrize(
    ("micro_batch", "message"),
    [("auto", "1 row of 16 tokens do not fit.*train.remat to blocks"),
     (2, "2 rows of 16 tokens do not fit.*lower train.micro_batch")],
)  # fmt: skip
def test_a_batch_that_cannot_be_halved_is_an_error(
    tmp_path: Path, small: LanguageModel, micro_batch: Any, message: str
) -> None:
    trainer, _ = make_trainer(tmp_path, small, micro_batch=micro_batch)

    def full(*_: object) -> object:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    trainer.train_step = full
    with pytest.raises(StageError, match=message):
        trainer.run()


def test_real_out_of_memory_errors_are_recognized(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(OUT_OF_MEMORY)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "recognized"


OUT_OF_MEMORY = """
import resource
import jax
import jax.numpy as jnp
from job.machine.limits import DeviceMemoryError, memory_errors

outer = jax.jit(lambda x: jnp.sort(x[:, None] * x[None, :]).sum(axis=0))
outer(jnp.ones(4)).block_until_ready()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    with memory_errors():
        outer(jnp.ones(60_000)).block_until_ready()
except DeviceMemoryError:
    print("recognized")
"""


def test_the_estimated_batch_follows_the_memory() -> None:
    assert rows_that_fit(16, row_bytes=10**9, resident_bytes=10**9, memory=30 * 10**9) == 16
    assert rows_that_fit(16, row_bytes=2 * 10**9, resident_bytes=10**9, memory=30 * 10**9) == 8
    assert rows_that_fit(12, row_bytes=10**9, resident_bytes=10**9, memory=10 * 10**9) == 4
    assert rows_that_fit(8, row_bytes=10**9, resident_bytes=10**9, memory=10**9) == 1


def test_training_without_improvement_stops_early(tmp_path: Path, small: LanguageModel) -> None:
    trainer, _ = make_trainer(tmp_path, small, learning_rate=0, validate_every=1, patience=4)
    result = trainer.run()
    assert result.progress.stopped_early
    assert result.progress.step == 4
    checkpoint = checkpoints_in(LocalStore(tmp_path)).load(ProcessGroup())
    assert checkpoint is not None
    assert checkpoint.progress.stopped_early
    assert trainer.run().progress.step == 4


def test_the_best_adapter_survives_an_interruption(tmp_path: Path, small: LanguageModel) -> None:
    unsteady: dict[str, Any] = {
        "optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_ratio": 0.0,
        "clip_norm": None, "validate_every": 1, "epochs": 2, "keep": "best",
    }  # fmt: skip
    expected = make_trainer(tmp_path / "expected", small, **unsteady)[0].run()
    best = expected.validation_after.step
    assert 0 < best < 6
    trainer, stop = make_trainer(tmp_path / "interrupted", small, **unsteady)

    def interrupt(call: int, _: Any) -> None:
        stop.requested = "SIGTERM" if call == best + 1 else None

    before_step(trainer, interrupt)
    with pytest.raises(RunStoppedError):
        trainer.run()
    resumed = trainer.run()
    assert resumed.validation_after == expected.validation_after
    assert_same_bytes(resumed, expected)
    # The adapter is the one that was validated.
    lora = jax.tree.map(jax.numpy.asarray, resumed.lora)
    again, _ = make_trainer(tmp_path / "again", small, lora=lora, learning_rate=0, epochs=1)
    assert again.run().validation_after.loss == expected.validation_after.loss
