"""Checkpoints: everything needed to resume training exactly, in one file.

A checkpoint is a safetensors file of named arrays (LoRA weights, optimizer variables, the best
adapter so far) with the progress in its metadata. It carries the digest of the training's inputs
and a hash of its arrays, so that a checkpoint of another training, or a damaged one, is never used.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel

from job.errors import StageError
from job.machine.distributed import ProcessGroup
from job.runtime import logs
from job.runtime.threads import Threads
from job.storage.base import Store

CHECKPOINTS = "checkpoints/"
_NEWEST = 2
"""Checkpoints that are not removed."""

_FORMAT = "2"
"""Format 1 had numbers for names."""


class Validation(BaseModel):
    """Mean loss and token accuracy over the validation rows after a step."""

    step: int
    loss: float
    token_accuracy: float


class TrainProgress(BaseModel):
    """How far training is, and sums for its metrics."""

    step: int = 0
    """Completed optimizer steps, which determine the position in the data."""
    seconds: float = 0.0
    """Seconds of training, without validation."""
    compile_seconds: float = 0.0
    """Seconds of these spent in the compiler."""
    tokens: int = 0
    """Tokens processed, without padding."""
    padded_tokens: int = 0
    """Tokens processed, padding included."""
    loss_tokens: int = 0
    """Tokens with a loss."""
    epoch_loss: float = 0.0
    """Summed loss of the current epoch."""
    epoch_correct: float = 0.0
    """Correct predictions of the current epoch."""
    epoch_loss_tokens: float = 0.0
    """Tokens with a loss of the current epoch."""
    validation_before: Validation | None = None
    """Validation before the first step."""
    validation: Validation | None = None
    """Newest validation."""
    best: Validation | None = None
    """Validation with the lowest loss so far."""
    validations_since_best: int = 0
    """Validations since the best one."""
    stopped_early: bool = False
    """Whether training ended because validation stopped improving."""

    @property
    def step_seconds(self) -> float:
        """Seconds of training without compilation."""
        return self.seconds - self.compile_seconds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: the progress, and arrays by name (see `job.train.state`)."""

    progress: TrainProgress
    arrays: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointFolder:
    """The folder of a training's checkpoints in a store."""

    store: Store
    prefix: str
    """Prefix of the keys, with a slash at the end."""
    inputs_digest: str
    """Digest of the training's inputs; checkpoints of other inputs are ignored."""

    def key(self, step: int) -> str:
        """Return the key of the checkpoint after a step."""
        return f"{self.prefix}step-{step:08d}.checkpoint.safetensors"


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and keeps the newest two.

    Leaving its block waits for the last one. Errors are raised by the next call.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._worker = Threads(1)
        self._write_in_progress: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._worker.shutdown()
        self.wait()

    @property
    def idle(self) -> bool:
        """Whether `save` would return without waiting for an earlier checkpoint."""
        return self._write_in_progress is None or self._write_in_progress.done()

    def save(self, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Args:
            checkpoint: its arrays are on the host.
            files: files to write first, by key.
        """
        self.wait()
        snapshot = Checkpoint(checkpoint.progress.model_copy(), checkpoint.arrays)
        self._write_in_progress = self._worker.submit(self._write, snapshot, files)

    def _write(self, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> None:
        folder, store = self._folder, self._folder.store
        for key, content in files.items():
            store.write(key, content)
        arrays = {name: np.asarray(array) for name, array in checkpoint.arrays.items()}
        metadata = {
            "format": _FORMAT,
            "inputs": folder.inputs_digest,
            "hash": _hash(arrays),
            "progress": checkpoint.progress.model_dump_json(),
        }
        content = safetensors.numpy.save(arrays, metadata=metadata)
        store.write(folder.key(checkpoint.progress.step), content)
        for key in sorted(store.list(folder.prefix))[:-_NEWEST]:
            store.delete(key)

    def wait(self) -> None:
        """Wait for the checkpoint being written; raise if that failed."""
        write, self._write_in_progress = self._write_in_progress, None
        if write is not None:
            write.result()


def load_checkpoint(
    folder: CheckpointFolder, processes: ProcessGroup | None = None
) -> Checkpoint | None:
    """Return the newest valid checkpoint of this training, or None; all processes must call it.

    Checkpoints of another training (other inputs) are removed; damaged ones are logged and removed.

    Raises:
        StageError: the checkpoint is of an earlier format, or cannot be read by this process.
    """
    processes = processes or ProcessGroup()
    step = json.loads(processes.broadcast(lambda: json.dumps(_newest_step(folder))))
    if step is None:
        return None
    try:
        return _parse(folder.store.read(folder.key(step)) or b"")
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise StageError(f"the checkpoint {folder.key(step)} cannot be read: {error}") from error


def _newest_step(folder: CheckpointFolder) -> int | None:
    store = folder.store
    for key in sorted(store.list(folder.prefix), reverse=True):
        content = store.read(key)
        if content is None:
            continue
        try:
            metadata = _metadata(content)
            if metadata["inputs"] != folder.inputs_digest:
                logs.get().info("checkpoint of another training removed", file=key)
                store.delete(key)
                continue
            if metadata.get("format") != _FORMAT:
                raise StageError(
                    f"the checkpoint {key} was written by another version of this job, which "
                    "cannot be resumed; run the same command with --fresh"
                )
            return _parse(content).progress.step
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            logs.get().warning(
                "damaged checkpoint removed; using the one before", file=key, error=str(error)
            )
            store.delete(key)
    return None


def _parse(content: bytes) -> Checkpoint:
    """Return the checkpoint in a file, after checking its arrays against its hash."""
    metadata = _metadata(content)
    arrays = safetensors.numpy.load(content)
    progress = TrainProgress.model_validate_json(metadata["progress"])
    if metadata["hash"] != _hash(arrays):
        raise ValueError("its arrays do not match its hash")
    return Checkpoint(progress, arrays)


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: JSON after an 8-byte little-endian length."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
