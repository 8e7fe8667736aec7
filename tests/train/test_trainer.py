"""Training lowers the loss, goes on exactly where it stopped, and stops when it breaks."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from job.data.packing import make_rows, tokenize
from job.errors import RunStoppedError, StageError
from job.machine.distributed import CoordinatedStop, ProcessGroup
from job.model.language_model import LanguageModel
from job.model.lora import Weights, flatten_lora
from job.runtime.signals import StopSignal
from job.spec.schema import Train
from job.storage.base import Store
from job.storage.local import LocalStore
from job.train.batching import BatchSchedule, rows_that_fit
from job.train.checkpoint import FOLDER, load_checkpoint
from job.train.step import Arrays, StepMetrics, TrainState
from job.train.trainer import HISTORY, Trainer, TrainerConfig, TrainResult
from tests.conversations import conversation

SAMPLES = [
    conversation(str(i), f"I have had pain in my {part} for {i} days.", f"Rest your {part} well.")
    for i, part in enumerate(["knee", "back", "neck", "hand", "foot", "head", "hip", "arm"] * 2)
]


def trainer(
    folder: Path, model: LanguageModel, store: Store | None = None, **train: object
) -> tuple[Trainer, StopSignal]:
    """A small training; compiled by blocks, because that is quicker."""
    settings = Train.model_validate(
        {"batch_size": 4, "learning_rate": 1e-2, "packing": False, "max_length": 64,
         "epochs": 3, "log_every": 1, "checkpoint_every": 5, "compile": "blocks"} | train
    )  # fmt: skip
    stop = StopSignal()
    found = tokenize(SAMPLES, model.tokenizer, 64, "response")
    rows = make_rows(found.examples[:12], 64, packing=False)
    validation = make_rows(found.examples[12:], 64, packing=False)
    config = TrainerConfig(settings, seed=0, packed=False, inputs="inputs")
    made = Trainer(
        model, rows, validation, model.lora.init(0), config,
        store or LocalStore(folder), CoordinatedStop(stop, ProcessGroup()),
    )  # fmt: skip
    return made, stop


def values(trained: TrainResult) -> list[np.ndarray]:
    return [np.asarray(array) for array in flatten_lora(trained.lora)]


def without_times(trainer: Trainer) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in trainer.curves()[HISTORY].splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_loss_falls_and_every_step_is_in_the_history(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny, validate_every=3)
    trained = made.run()
    lines = [json.loads(line) for line in made.curves()[HISTORY].splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6, 9]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    before = trained.progress.validation_before
    assert before is not None
    assert trained.validation_after.loss < before.loss - 0.5
    epoch = [line for line in steps if line["step"] > 6]
    mean = trained.progress.epoch_loss / trained.progress.epoch_loss_tokens
    assert min(s["loss"] for s in epoch) < mean < max(s["loss"] for s in epoch)


def test_learning_rate_zero_changes_nothing(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny, learning_rate=0, epochs=1)
    trained = made.run()
    for ours, start in zip(values(trained), flatten_lora(tiny.lora.init(0)), strict=True):
        np.testing.assert_array_equal(ours, start)
    before = trained.progress.validation_before
    assert before is not None
    assert trained.validation_after.loss == before.loss


class SlowStore(LocalStore):
    """A store that keeps checkpoints waiting until `ready`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ready = threading.Event()
        self.written: list[str] = []

    def write(self, key: str, content: bytes) -> None:
        if key.startswith(FOLDER):
            assert self.ready.wait(60), "steps wait for a checkpoint"
            self.written.append(key)
        super().write(key, content)


def test_steps_do_not_wait_for_slow_storage(tmp_path: Path, tiny: LanguageModel) -> None:
    store = SlowStore(tmp_path)
    made, _ = trainer(tmp_path, tiny, store, checkpoint_every=2)
    step, count = made._step, 0

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        if count == made._plan.steps:
            store.ready.set()
        return step(*args)

    made._step = counting
    assert made.run().progress.step == 9
    assert [Path(key).name[:13] for key in store.written] == ["step-00000002", "step-00000009"]


@pytest.mark.parametrize(
    ("stop_after", "one"), [(1, "blocks"), (4, "blocks"), (5, "step"), (8, "blocks")]
)
def test_stopped_and_resumed_training_ends_with_the_same_adapter(
    tmp_path: Path, tiny: LanguageModel, stop_after: int, one: str
) -> None:
    settings = {"compile": one, "micro_batch": 2 if stop_after == 4 else "auto"}
    unbroken = trainer(tmp_path / "whole", tiny, **settings)[0].run()
    broken, stop = trainer(tmp_path / "broken", tiny, **settings)
    count = 0
    step = broken._step

    def stopping(*args: object) -> object:
        nonlocal count
        count += 1
        if count == stop_after:
            stop.requested = "SIGTERM"
        return step(*args)

    broken._step = stopping
    with pytest.raises(RunStoppedError):
        broken.run()
    kept = load_checkpoint(LocalStore(tmp_path / "broken"), "inputs")
    assert kept is not None
    assert kept.progress.step == stop_after
    resumed = trainer(tmp_path / "broken", tiny, **settings)[0].run()
    for ours, theirs in zip(values(resumed), values(unbroken), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert resumed.progress.tokens == unbroken.progress.tokens
    assert resumed.progress.epoch_loss == pytest.approx(unbroken.progress.epoch_loss)
    history = (LocalStore(tmp_path / "broken").read(HISTORY) or b"").splitlines()
    lines = [json.loads(line) for line in history]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))


def test_loss_that_is_not_finite_stops_and_names_step_and_examples(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    made, _ = trainer(tmp_path, tiny, checkpoint_every=1)
    broken = made._model.weights
    step = made._step

    calls = 0

    def poisoned(state: object, weights: tuple, batch: dict) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            weights = tuple(
                jax.numpy.full_like(w, jax.numpy.nan) if w.ndim > 1 else w for w in broken
            )
        return step(state, weights, batch)

    made._step = poisoned
    with pytest.raises(StageError, match=r"step 3 has a loss of nan.*examples are \d+, \d+"):
        made.run()
    kept = load_checkpoint(LocalStore(tmp_path), "inputs")
    assert kept is not None
    assert kept.progress.step in (1, 2)  # the second waits while the first is being written
    assert all(np.isfinite(array).all() for array in kept.arrays)


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("sgd", 3.0), ("lion", 3e-3), ("adafactor", 1.0), ("muon", 3e-2)]
)
def test_every_optimizer_lowers_the_loss(
    tmp_path: Path, tiny: LanguageModel, optimizer: str, rate: float
) -> None:
    made, _ = trainer(tmp_path, tiny, optimizer=optimizer, learning_rate=rate)
    trained = made.run()
    before = trained.progress.validation_before
    assert before is not None
    assert trained.validation_after.loss < before.loss - 0.1


def test_training_resumed_after_its_last_step_ends_the_same(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    first, _ = trainer(tmp_path, tiny, epochs=1)
    trained = first.run()
    LocalStore(tmp_path).write(HISTORY, first.curves()[HISTORY])
    second, _ = trainer(tmp_path, tiny, epochs=1)
    again = second.run()
    for ours, theirs in zip(values(again), values(trained), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert without_times(second) == without_times(first)


def test_fewer_rows_at_once_give_the_same_training(tmp_path: Path, tiny: LanguageModel) -> None:
    whole = trainer(tmp_path / "4", tiny, optimizer="sgd")[0].run()
    parts = trainer(tmp_path / "1", tiny, optimizer="sgd", micro_batch=1)[0].run()
    for ours, theirs in zip(values(parts), values(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("checkpoint_every", [1, 100])
def test_out_of_memory_halves_the_rows_at_once_and_goes_on(
    tmp_path: Path, tiny: LanguageModel, checkpoint_every: int
) -> None:
    expected = trainer(tmp_path / "whole", tiny, optimizer="sgd")[0].run()
    made, _ = trainer(tmp_path / "full", tiny, optimizer="sgd", checkpoint_every=checkpoint_every)
    assert made._portions.at_once == 4
    step, calls = made._step, 0

    def full(state: TrainState, weights: Weights, batch: Arrays) -> tuple[TrainState, StepMetrics]:
        nonlocal calls
        calls += 1
        if calls > 2 and batch["token_ids"].shape[1] > 1:
            # As on a device: the memory given away is gone.
            jax.tree.map(lambda array: array.delete(), state)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return step(state, weights, batch)

    made._step = full
    trained = made.run()
    assert made._portions.at_once == 1
    assert trained.progress.tokens == expected.progress.tokens
    for ours, theirs in zip(values(trained), values(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_one_row_that_does_not_fit_is_told(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny)

    def full(*_: object) -> object:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    made._step = full
    with pytest.raises(StageError, match=r"1 row of 64 tokens do not fit.*train.remat to blocks"):
        made.run()


def test_real_memory_running_out_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(OUT_OF_MEMORY)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "noticed"


OUT_OF_MEMORY = """
import resource
import jax
import jax.numpy as jnp
from job.train.portions import OutOfMemory, memory_errors

outer = jax.jit(lambda x: jnp.sort(x[:, None] * x[None, :]).sum(axis=0))
outer(jnp.ones(4)).block_until_ready()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    with memory_errors():
        outer(jnp.ones(60_000)).block_until_ready()
except OutOfMemory:
    print("noticed")
"""


def test_the_estimate_of_rows_follows_the_memory() -> None:
    assert rows_that_fit(16, row_bytes=10**9, held=10**9, memory=30 * 10**9) == 16
    assert rows_that_fit(16, row_bytes=2 * 10**9, held=10**9, memory=30 * 10**9) == 8
    assert rows_that_fit(12, row_bytes=10**9, held=10**9, memory=10 * 10**9) == 4
    assert rows_that_fit(8, row_bytes=10**9, held=10**9, memory=10**9) == 1


def test_training_that_gets_no_better_stops_early(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny, learning_rate=0, validate_every=1, patience=4)
    trained = made.run()
    assert trained.progress.stopped
    assert trained.progress.step == 4
    kept = load_checkpoint(LocalStore(tmp_path), "inputs")
    assert kept is not None
    assert kept.progress.stopped
    again = trainer(tmp_path, tiny, learning_rate=0, validate_every=1, patience=4)[0].run()
    assert again.progress.step == 4


def test_the_best_adapter_is_kept_through_a_stop(tmp_path: Path, tiny: LanguageModel) -> None:
    ruin = {"learning_rate": 0.3, "schedule": "constant", "warmup_ratio": 0.0,
            "validate_every": 1, "clip_norm": None, "keep": "best"}  # fmt: skip
    unbroken = trainer(tmp_path / "whole", tiny, **ruin)[0].run()
    best = unbroken.validation_after.step
    assert 0 < best < 9
    broken, stop = trainer(tmp_path / "broken", tiny, **ruin)
    step, calls = broken._step, 0

    def stopping(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == best + 1:
            stop.requested = "SIGTERM"
        return step(*args)

    broken._step = stopping
    with pytest.raises(RunStoppedError):
        broken.run()
    second = trainer(tmp_path / "broken", tiny, **ruin)[0]
    resumed = second.run()
    assert resumed.validation_after == unbroken.validation_after
    second._state = second._place(flatten_lora(resumed.lora), second._start[1])
    assert second._validate().loss == unbroken.validation_after.loss
    for ours, theirs in zip(values(resumed), values(unbroken), strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_rows_of_like_lengths_share_steps_and_the_loss_stays(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    found = tokenize(SAMPLES, tiny.tokenizer, 64, "response").examples
    ends = [len(e.token_ids) - 2 * (i % 4) for i, e in enumerate(found)]
    found = [
        replace(e, token_ids=e.token_ids[:end], loss_mask=e.loss_mask[:end])
        for e, end in zip(found, ends, strict=True)
    ]
    found = [example for example in found if any(example.loss_mask)]
    made, _ = trainer(tmp_path, tiny, epochs=2)
    lengths = [len(example.token_ids) for example in found]
    rows = make_rows(found, 64, packing=False, buckets=sorted({*lengths, 64}))
    assert len(rows.buckets) > 2
    plain = make_rows(found, 64, packing=False)
    made._validation = plain
    padded = made._validate()
    made._validation = rows
    assert made._validate().loss == pytest.approx(padded.loss, rel=1e-5)
    assert rows.fill > 2 * plain.fill
    assert 0.9 < rows.fill <= 1

    plan = BatchSchedule(len(rows.batch), 4, 2, 0, tuple(rows.lengths.tolist()))
    for epoch in range(2):
        taken = [
            plan.batch_indices(epoch * plan.steps_per_epoch + s)
            for s in range(plan.steps_per_epoch)
        ]
        flat = np.concatenate(taken)
        assert sorted(flat[flat >= 0]) == list(range(len(rows.batch)))
    together = sum(int(rows.lengths[t[t >= 0]].max()) for t in taken[:-1])
    chance = BatchSchedule(len(rows.batch), 4, 2, 0)
    apart = sum(int(rows.lengths[chance.batch_indices(s)].max()) for s in range(len(taken) - 1))
    assert together < apart
