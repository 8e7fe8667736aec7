"""Checkpoints: everything needed to resume training exactly, in one file.

A checkpoint is a safetensors file of named arrays (LoRA weights, optimizer variables, the best
adapter so far) with the progress in its metadata. It carries the digest of the training's inputs
and a hash of its arrays, so that a checkpoint of another training, or a damaged one, is never used.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Self

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

_DAMAGED = (safetensors.SafetensorError, ValueError, KeyError)


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


class Checkpoint(NamedTuple):
    """A checkpoint: the progress, and arrays by name (see `job.train.state`)."""

    progress: TrainProgress
    arrays: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a training, in a folder of a store; the newest two are kept.

    Within a `with` block they are written in the background, one at a time; leaving it waits for
    the last one. Errors are raised by the next call.
    """

    def __init__(self, store: Store, folder: str, inputs_digest: str) -> None:
        """Use the folder, which ends with a slash; checkpoints of other inputs are ignored."""
        self._store = store
        self._folder = folder
        self._inputs_digest = inputs_digest
        self._write_in_progress: Future[None] | None = None

    def __enter__(self) -> Self:
        self._worker = Threads(1)
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
        snapshot = checkpoint._replace(progress=checkpoint.progress.model_copy())
        self._write_in_progress = self._worker.submit(self._write, snapshot, files)

    def wait(self) -> None:
        """Wait for the checkpoint being written; raise if that failed."""
        write, self._write_in_progress = self._write_in_progress, None
        if write is not None:
            write.result()

    def _write(self, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> None:
        for key, content in files.items():
            self._store.write(key, content)
        arrays = {name: np.asarray(array) for name, array in checkpoint.arrays.items()}
        metadata = {
            "format": _FORMAT,
            "inputs": self._inputs_digest,
            "hash": _hash(arrays),
            "progress": checkpoint.progress.model_dump_json(),
        }
        key = f"{self._folder}step-{checkpoint.progress.step:08d}.checkpoint.safetensors"
        self._store.write(key, safetensors.numpy.save(arrays, metadata=metadata))
        for key in sorted(self._store.list(self._folder))[:-_NEWEST]:
            self._store.delete(key)

    def load(self, processes: ProcessGroup) -> Checkpoint | None:
        """Return the newest valid checkpoint of this training, or None; all processes call it.

        Checkpoints of another training are removed; damaged ones are logged and removed.

        Raises:
            StageError: the checkpoint is of an earlier format, or cannot be read by this process.
        """
        key = json.loads(processes.broadcast(lambda: json.dumps(self._newest())))
        try:
            return _parse(self._store.read(key) or b"") if key else None
        except _DAMAGED as error:
            raise StageError(f"the checkpoint {key} cannot be read: {error}") from error

    def _newest(self) -> str | None:
        """Return the key of the newest valid checkpoint."""
        for key in sorted(self._store.list(self._folder), reverse=True):
            content = self._store.read(key)
            if content is None:
                continue
            try:
                metadata = _metadata(content)
                if metadata["inputs"] != self._inputs_digest:
                    logs.get().info("checkpoint of another training removed", file=key)
                    self._store.delete(key)
                    continue
                if metadata.get("format") != _FORMAT:
                    raise StageError(
                        f"the checkpoint {key} was written by another version of this job, which "
                        "cannot be resumed; run the same command with --fresh"
                    )
                _parse(content)
                return key
            except _DAMAGED as error:
                logs.get().warning(
                    "damaged checkpoint removed; using the one before", file=key, error=str(error)
                )
                self._store.delete(key)
        return None


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


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
