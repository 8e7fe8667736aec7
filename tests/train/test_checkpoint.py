"""A checkpoint is whole or not used, belongs to one training, and only the newest are kept."""

import time
from pathlib import Path

import numpy as np
import pytest

from job.errors import StageError
from job.storage.local import LocalStore
from job.train.batching import BatchSchedule
from job.train.checkpoint import (
    FOLDER,
    CheckpointWriter,
    TrainProgress,
    Validation,
    load_checkpoint,
    save_checkpoint,
)

BEFORE = Validation(step=0, loss=1.5, token_accuracy=0.25)


def arrays(step: int) -> list[np.ndarray]:
    return [np.full((2, 3), step, np.float32), np.array(step, np.int32), np.zeros((0, 4), np.int64)]


def saved(tmp_path: Path, *steps: int) -> LocalStore:
    store = LocalStore(tmp_path)
    for step in steps:
        progress = TrainProgress(step=step, epoch_loss=0.1 + step, validation_before=BEFORE)
        save_checkpoint(store, "inputs", progress, arrays(step))
    return store


def test_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    found = load_checkpoint(saved(tmp_path, 7), "inputs")
    assert found is not None
    assert found.progress == TrainProgress(step=7, epoch_loss=7.1, validation_before=BEFORE)
    for ours, expected in zip(found.arrays, arrays(7), strict=True):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, 10, 15, 100)
    assert [Path(key).stem for key in store.list(FOLDER)] == [
        "step-00000015.checkpoint",
        "step-00000100.checkpoint",
    ]
    found = load_checkpoint(store, "inputs")
    assert found is not None
    assert found.progress.step == 100


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = saved(tmp_path, 5, 10)
    newest = tmp_path / FOLDER / "step-00000010.checkpoint.safetensors"
    content = newest.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    newest.write_bytes(
        {"cut": content[:-9], "flipped": flipped, "empty": b"", "text": b"x" * 99}[damage]
    )
    found = load_checkpoint(store, "inputs")
    assert found is not None
    assert found.progress.step == 5
    assert "damaged" in capsys.readouterr().out


def test_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    store = saved(tmp_path, 5)
    assert load_checkpoint(store, "other inputs") is None
    assert store.list(FOLDER) == []


def test_every_row_is_trained_on_once_an_epoch_in_an_order_of_the_seed() -> None:
    plan = BatchSchedule(rows=10, batch_size=4, epochs=2, seed=3)
    assert plan.steps == 6
    epochs = [
        np.concatenate([plan.batch_indices(s) for s in steps]) for steps in (range(3), range(3, 6))
    ]
    for rows in epochs:
        assert sorted(rows) == [-1, -1, *range(10)]
    assert epochs[0].tolist() != epochs[1].tolist()
    other = BatchSchedule(rows=10, batch_size=4, epochs=2, seed=4)
    assert plan.batch_indices(0).tolist() != other.batch_indices(0).tolist()


class SlowStore(LocalStore):
    """A store whose writes take a while, or fail."""

    failing = False

    def write(self, key: str, content: bytes) -> None:
        time.sleep(0.2)
        if self.failing:
            raise StageError("no room left")
        super().write(key, content)


def test_checkpoints_are_written_while_training_goes_on(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    progress = TrainProgress(step=1)
    with CheckpointWriter(store, "inputs") as writer:
        clock = time.monotonic()
        writer.save(progress, arrays(1), {"train/history.jsonl": b"{}"})
        assert time.monotonic() - clock < 0.1
        progress.step = 2
        assert store.list(FOLDER) == []
    found = load_checkpoint(store, "inputs")
    assert found is not None
    assert found.progress.step == 1
    assert store.read("train/history.jsonl") == b"{}"


def test_checkpoint_that_cannot_be_written_stops_the_training(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    store.failing = True
    with pytest.raises(StageError, match="no room left"), CheckpointWriter(store, "i") as writer:
        writer.save(TrainProgress(step=1), arrays(1), {})
        writer.wait()
