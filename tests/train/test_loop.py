"""Training lowers the loss, goes on exactly where it stopped, and stops when it breaks."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from job.data.examples import Example
from job.data.packing import make_rows, tokenize
from job.errors import Interrupted, StageError
from job.model.language_model import LanguageModel
from job.model.lora import flatten
from job.results import EnvironmentInfo
from job.run import Run, StopSignal
from job.spec import Spec, Train
from job.storage import LocalStore
from job.train.checkpoint import load_checkpoint
from job.train.loop import HISTORY, Trained, Trainer

MACHINE = EnvironmentInfo(
    platform="cpu", device_kind="cpu", devices=1, processes=1, python="3.12", packages={},
    git_commit=None, image=None,
)  # fmt: skip
SAMPLES = [
    Example(str(i), None, f"I have had pain in my {part} for {i} days.", f"Rest your {part} well.")
    for i, part in enumerate(["knee", "back", "neck", "hand", "foot", "head", "hip", "arm"] * 2)
]


def trainer(folder: Path, model: LanguageModel, **train: object) -> tuple[Trainer, Run]:
    settings = Train.model_validate(
        {"batch_size": 4, "learning_rate": 1e-2, "packing": False, "max_length": 64,
         "epochs": 3, "log_every": 1, "checkpoint_every": 5} | train
    )  # fmt: skip
    spec = Spec.model_validate({
        "name": "t",
        "model": {"preset": "tiny", "dtype": "float32", "lora": {"rank": 4}},
        "data": {"dataset": "samples", "prompt": "{input}", "response": "{output}"},
        "train": settings.model_dump(),
    })  # fmt: skip
    store, stop = LocalStore(folder), StopSignal()
    run = Run("t", spec, store, folder, stop, MACHINE, lambda: model.mesh)
    run.digests["train"] = "inputs"
    found = tokenize(SAMPLES, model.codec, 64, "response")
    rows = make_rows(found.examples[:12], 64, packing=False)
    validation = make_rows(found.examples[12:], 64, packing=False)
    return Trainer(run, model, rows, validation, packed=False), run


def values(trained: Trained) -> list[np.ndarray]:
    return [np.asarray(array) for array in flatten(trained.lora)]


def test_loss_falls_and_every_step_is_in_the_history(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny, validate_every=3)
    trained = made.run()
    lines = [json.loads(line) for line in made.history().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6, 9]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    before = trained.progress.validation_before
    assert before is not None
    assert trained.validation_after[0] < before[0] - 0.5
    epoch = [line for line in steps if line["step"] > 6]
    mean = trained.progress.epoch_loss / trained.progress.epoch_loss_tokens
    assert min(s["loss"] for s in epoch) < mean < max(s["loss"] for s in epoch)


def test_learning_rate_zero_changes_nothing(tmp_path: Path, tiny: LanguageModel) -> None:
    made, _ = trainer(tmp_path, tiny, learning_rate=0, epochs=1)
    trained = made.run()
    for ours, start in zip(values(trained), flatten(tiny.lora.start(0)), strict=True):
        np.testing.assert_array_equal(ours, start)
    assert trained.validation_after == trained.progress.validation_before


@pytest.mark.parametrize("stop_after", [1, 4, 5, 8])
def test_stopped_and_resumed_training_ends_with_the_same_adapter(
    tmp_path: Path, tiny: LanguageModel, stop_after: int
) -> None:
    unbroken = trainer(tmp_path / "whole", tiny)[0].run()
    broken, run = trainer(tmp_path / "broken", tiny)
    count = 0
    step = broken._step

    def stopping(*args: object) -> object:
        nonlocal count
        count += 1
        if count == stop_after:
            run.stop.requested = "SIGTERM"
        return step(*args)

    broken._step = stopping
    with pytest.raises(Interrupted):
        broken.run()
    kept = load_checkpoint(run.store, "inputs")
    assert kept is not None
    assert kept.progress.step == stop_after
    resumed = trainer(tmp_path / "broken", tiny)[0].run()
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
    made, run = trainer(tmp_path, tiny, checkpoint_every=1)
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
    kept = load_checkpoint(run.store, "inputs")
    assert kept is not None
    assert kept.progress.step == 2
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
    assert trained.validation_after[0] < before[0] - 0.1


def test_training_resumed_after_its_last_step_ends_the_same(
    tmp_path: Path, tiny: LanguageModel
) -> None:
    first, run = trainer(tmp_path, tiny, epochs=1)
    trained = first.run()
    run.store.write(HISTORY, first.history())
    second, _ = trainer(tmp_path, tiny, epochs=1)
    again = second.run()
    for ours, theirs in zip(values(again), values(trained), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert second.history() == first.history()
