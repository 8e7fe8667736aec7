"""Results of finished batches, saved while a model is evaluated so that it can resume."""

import contextlib
import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from job.errors import JobError
from job.runtime import logs
from job.spec.load import digest
from job.storage.base import Store

CACHE_SECONDS = 20.0
"""Minimum seconds between two writes: the work lost to a kill, besides the current batch."""

Broadcast = Callable[[Callable[[], str]], str]
"""Calls a function on the primary process and returns its text on every process."""


class PredictionCache:
    """The finished batches of one model's evaluations: written on an error, deleted on success."""

    def __init__(self, store: Store, key: str, inputs: object, broadcast: Broadcast) -> None:
        """Load the batches that an earlier start finished.

        Args:
            store: where the file is; read-only except on the primary process.
            key: key of the file.
            inputs: everything that the results, and how they are batched, depend on; a file of
                other inputs is ignored.
            broadcast: makes all processes agree on which batches are left.
        """
        self._key = key
        self._store = store
        self._inputs_digest = digest(inputs)
        self._written = time.monotonic()
        self._has_changes = False
        self._batches: dict[str, dict[str, list[Any]]] = json.loads(broadcast(self._read))
        if self._batches:
            finished = {name: len(batches) for name, batches in self._batches.items()}
            logs.get().info("resumed evaluation", file=key, batches=finished)

    def _read(self) -> str:
        content = self._store.read(self._key)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            document = json.loads(content or b"")
            if document["inputs"] == self._inputs_digest:
                return json.dumps(dict(document["batches"]))
        return "{}"

    def get(self, name: str, batch: int) -> list[Any] | None:
        """Return the results of a batch of an evaluation, or None."""
        return self._batches.get(name, {}).get(str(batch))

    def add(self, name: str, batch: int, results: list[Any]) -> None:
        """Add the results of a batch: values that JSON represents exactly."""
        self._batches.setdefault(name, {})[str(batch)] = results
        self._has_changes = True
        if time.monotonic() - self._written >= CACHE_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._has_changes:
            content = {"inputs": self._inputs_digest, "batches": self._batches}
            self._store.write(self._key, json.dumps(content, ensure_ascii=False).encode())
        self._has_changes = False
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self._store.delete(self._key)
            return
        with contextlib.suppress(JobError):  # the error that stopped the work matters more
            self._write()
