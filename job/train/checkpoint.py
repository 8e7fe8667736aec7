"""Checkpoints: everything training needs to go on as if it had never stopped, in one file.

A checkpoint is one safetensors file (adapter and optimizer arrays; step, sums and times in
its metadata) written whole through the store. It carries the digest of the training's inputs
and a hash of its own arrays, so neither another training's nor a damaged file is ever used.
"""

import contextvars
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel

from job.errors import StageError
from job.runtime import logs
from job.storage.base import Store

FOLDER = "train/checkpoints/"


KEPT = 2


class Validation(BaseModel):
    """Mean loss and token accuracy over the validation rows after some step."""

    step: int
    loss: float
    token_accuracy: float


class TrainProgress(BaseModel):
    """How far training is, and the sums its figures are made of."""

    step: int = 0
    """Optimizer steps done; the position in the data follows from it."""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens: int = 0
    """Tokens passed through the model, without padding."""
    slots: int = 0
    """Token slots passed through the model, padding counted."""
    loss_tokens: int = 0
    epoch_loss: float = 0.0
    epoch_correct: float = 0.0
    epoch_loss_tokens: float = 0.0
    validation_before: Validation | None = None
    """Before the first step."""
    validation: Validation | None = None
    """The newest."""
    best: Validation | None = None
    """That of the lowest loss so far."""
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether training ended early for want of a better validation."""

    @property
    def busy(self) -> float:
        """Seconds of training without compilation."""
        return self.seconds - self.compile_seconds


class Checkpoint(BaseModel):
    """A checkpoint that was read back."""

    model_config = {"arbitrary_types_allowed": True}

    progress: TrainProgress
    arrays: list[Any]


def _key(step: int) -> str:
    return f"{FOLDER}step-{step:08d}.checkpoint.safetensors"


def _hash(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_checkpoint(
    store: Store, inputs: str, progress: TrainProgress, arrays: Sequence[Any]
) -> None:
    """Write a checkpoint and remove all but the newest two.

    Args:
        inputs: digest of the training's inputs.
        arrays: adapter and optimizer arrays, in the order they are to be read back.
    """
    values = [np.asarray(array) for array in arrays]
    content = safetensors.numpy.save(
        {f"{number:05d}": value for number, value in enumerate(values)},
        metadata={"inputs": inputs, "hash": _hash(values), "progress": progress.model_dump_json()},
    )
    store.write(_key(progress.step), content)
    for key in sorted(store.list(FOLDER))[:-KEPT]:
        store.delete(key)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, so that steps go on meanwhile.

    Leaving its block waits for the last one. What went wrong is raised by the next call.
    """

    def __init__(self, store: Store, inputs: str) -> None:
        self._store = store
        self._inputs = inputs
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_raised: object) -> None:
        self._worker.shutdown()
        self.wait()

    @property
    def idle(self) -> bool:
        """Whether a checkpoint begun now would not wait for the one before."""
        return self._pending is None or self._pending.done()

    def save(
        self, progress: TrainProgress, arrays: Sequence[Any], beside: Mapping[str, bytes]
    ) -> None:
        """Begin to write a checkpoint, once the one before is there.

        Args:
            arrays: as for `save_checkpoint`, already on the host.
            beside: files to write first, by key.
        """
        self.wait()
        copied = progress.model_copy()
        context = contextvars.copy_context()
        self._pending = self._worker.submit(context.run, self._write, copied, arrays, beside)

    def _write(
        self, progress: TrainProgress, arrays: Sequence[Any], beside: Mapping[str, bytes]
    ) -> None:
        for key, content in beside.items():
            self._store.write(key, content)
        save_checkpoint(self._store, self._inputs, progress, arrays)

    def wait(self) -> None:
        """Return once what was begun is written; raise if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def newest_step(store: Store, inputs: str) -> int | None:
    """The step of the newest whole checkpoint of this training, or None.

    Those of another training (other inputs) are removed; damaged ones are named and passed over.
    """
    for key in sorted(store.list(FOLDER), reverse=True):
        content = store.read(key)
        if content is None:
            continue
        try:
            written_for, found = _read(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            logs.get().warning(
                "checkpoint is damaged; going back to the one before", file=key, error=str(error)
            )
            store.delete(key)
            continue
        if written_for == inputs:
            return found.progress.step
        logs.get().info("checkpoint is of another training; removed", file=key)
        store.delete(key)
    return None


def read_checkpoint(store: Store, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        StageError: it is not there, or damaged.
    """
    try:
        return _read(store.read(_key(step)) or b"")[1]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise StageError(f"the checkpoint {_key(step)} cannot be read: {error}") from error


def load_checkpoint(store: Store, inputs: str) -> Checkpoint | None:
    """The newest whole checkpoint of this training, or None; see `newest_step`."""
    step = newest_step(store, inputs)
    return None if step is None else read_checkpoint(store, step)


def _read(content: bytes) -> tuple[str, Checkpoint]:
    """The digest of a checkpoint's inputs, and the checkpoint, if its arrays match its hash."""
    metadata = _metadata(content)
    tensors = safetensors.numpy.load(content)
    arrays = [tensors[name] for name in sorted(tensors)]
    progress = TrainProgress.model_validate_json(metadata["progress"])
    if metadata["hash"] != _hash(arrays):
        raise ValueError("its arrays do not match its hash")
    return metadata["inputs"], Checkpoint(progress=progress, arrays=arrays)


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: JSON after an 8-byte little-endian length."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
