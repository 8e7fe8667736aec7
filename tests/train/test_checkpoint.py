"""A checkpoint has named arrays, is valid or not used, and belongs to one training."""

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from job.errors import StageError
from job.machine.distributed import ProcessGroup
from job.model.language_model import LanguageModel
from job.model.lora import LoraWeights
from job.spec.schema import Train
from job.storage.local import LocalStore
from job.train.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    TrainProgress,
    Validation,
)
from job.train.optimizer import make_optimizer
from job.train.state import StateNames, TrainState
from tests.train.small import checkpoints_in, perturbed_lora

BEFORE = Validation(step=0, loss=1.5, token_accuracy=0.25)


def checkpoint_of(step: int) -> Checkpoint:
    arrays = {
        "lora/block/query/a": np.full((2, 3), step, np.float32),
        "optimizer/iteration": np.array(step, np.int32),
        "best/lora/block/query/a": np.zeros((0, 4), np.int64),
    }
    progress = TrainProgress(step=step, epoch_loss=0.1 + step, validation_before=BEFORE)
    return Checkpoint(progress, arrays)


def saved(folder: Path, *steps: int) -> LocalStore:
    store = LocalStore(folder)
    with checkpoints_in(store) as writer:
        for step in steps:
            writer.save(checkpoint_of(step), {})
    return store


def path_of(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:08d}.checkpoint.safetensors"


def load(store: LocalStore) -> Checkpoint:
    checkpoint = checkpoints_in(store).load(ProcessGroup())
    assert checkpoint is not None
    return checkpoint


def test_a_checkpoint_is_read_back_by_name(tmp_path: Path) -> None:
    checkpoint = load(saved(tmp_path, 7))
    expected = checkpoint_of(7)
    assert checkpoint.progress == expected.progress
    assert checkpoint.arrays.keys() == expected.arrays.keys()
    assert safetensors.numpy.load_file(path_of(tmp_path, 7)).keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(checkpoint.arrays[name], array)
        assert checkpoint.arrays[name].dtype == array.dtype


def test_only_the_newest_two_are_not_removed(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, 10, 15, 100)
    assert store.list(CHECKPOINTS) == [
        f"{CHECKPOINTS}step-00000015.checkpoint.safetensors",
        f"{CHECKPOINTS}step-00000100.checkpoint.safetensors",
    ]
    assert load(store).progress.step == 100


def renamed(content: bytes) -> bytes:
    return content.replace(b"lora/block/query/a", b"lora/block/query/b", 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "empty", "text"])
def test_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, newest = saved(tmp_path, 5, 10), path_of(tmp_path, 10)
    content = newest.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    damaged = {"cut": content[:-9], "flipped": flipped, "renamed": renamed(content),
               "empty": b"", "text": b"x" * 99}  # fmt: skip
    newest.write_bytes(damaged[damage])
    assert load(store).progress.step == 5
    assert "damaged" in capsys.readouterr().out


def test_a_checkpoint_of_another_training_is_removed(tmp_path: Path) -> None:
    store = saved(tmp_path, 5)
    assert checkpoints_in(store, "other inputs").load(ProcessGroup()) is None
    assert store.list(CHECKPOINTS) == []


def test_a_checkpoint_with_numbered_arrays_is_refused(tmp_path: Path) -> None:
    """As an earlier version of this job wrote them."""
    progress = TrainProgress(step=3).model_dump_json()
    metadata = {"inputs": "inputs", "hash": "0", "progress": progress}
    path = path_of(tmp_path, 3)
    path.parent.mkdir(parents=True)
    path.write_bytes(safetensors.numpy.save({"00000": np.zeros(2)}, metadata=metadata))
    with pytest.raises(StageError, match="another version.* run the same command with --fresh"):
        checkpoints_in(LocalStore(tmp_path)).load(ProcessGroup())


class GatedStore(LocalStore):
    """A store that writes when `gate` opens, or fails."""

    def __init__(self, folder: Path, *, failing: bool = False) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.failing = failing

    def write(self, key: str, content: bytes) -> None:
        assert self.gate.wait(60)
        if self.failing:
            raise StageError("no space left")
        super().write(key, content)


def test_checkpoints_are_written_while_training_continues(tmp_path: Path) -> None:
    store, checkpoint = GatedStore(tmp_path), checkpoint_of(1)
    with checkpoints_in(store) as writer:
        writer.save(checkpoint, {"history.jsonl": b"{}"})
        assert not writer.idle
        checkpoint.progress.step = 2
        assert store.list(CHECKPOINTS) == []
        store.gate.set()
    assert load(store).progress.step == 1
    assert store.read("history.jsonl") == b"{}"


def test_a_failed_write_stops_the_training(tmp_path: Path) -> None:
    store = GatedStore(tmp_path, failing=True)
    store.gate.set()
    writer = checkpoints_in(store)
    with pytest.raises(StageError, match="no space left"), writer:
        writer.save(checkpoint_of(1), {})
        writer.wait()


@pytest.fixture(params=["sgd", "adamw", "lion"])
def named(
    request: pytest.FixtureRequest, small: LanguageModel
) -> tuple[StateNames, TrainState, LoraWeights]:
    """Names and the state of each optimizer; every array differs from the others."""
    lora: Any = perturbed_lora(small)
    optimizer, _ = make_optimizer(Train(optimizer=request.param), 3, lora)
    variables = tuple(np.full(v.shape, n, v.dtype) for n, v in enumerate(optimizer.variables))
    return StateNames(small.lora, optimizer), TrainState(lora, variables), small.lora.init(1)


def test_a_state_is_rebuilt_by_name(named: tuple[StateNames, TrainState, LoraWeights]) -> None:
    names, state, best = named
    arrays = names.to_arrays(state, best)
    assert len(arrays) == len(jax.tree.leaves((state, best)))
    assert "lora/decoder_block_0/attention/value/a" in arrays
    shuffled = dict(sorted(arrays.items(), reverse=True))
    rebuilt = names.from_arrays(shuffled, best=True)
    for ours, theirs in zip(jax.tree.leaves(rebuilt), jax.tree.leaves((state, best)), strict=True):
        assert ours is theirs


def test_a_missing_or_unknown_name_is_refused(
    named: tuple[StateNames, TrainState, LoraWeights],
) -> None:
    names, state, _ = named
    arrays = names.to_arrays(state)
    name = "lora/decoder_block_1/attention/value/b"
    with pytest.raises(StageError, match=f"lacks {name}.*--fresh"):
        names.from_arrays({n: a for n, a in arrays.items() if n != name}, best=False)
    with pytest.raises(StageError, match=r"unknown array lora/x.*--fresh"):
        names.from_arrays(arrays | {"lora/x": np.zeros(1)}, best=False)
    with pytest.raises(StageError, match="lacks best/lora/"):
        names.from_arrays(arrays, best=True)
