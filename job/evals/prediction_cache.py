"""Results of finished batches, saved while an evaluation runs so that it can resume."""

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
    """The finished batches of one evaluation of one model (an `engine.BatchCache`)."""

    def __init__(self, store: Store, key: str, inputs_digest: str, broadcast: Broadcast) -> None:
        """Load the batches that an earlier start finished.

        Args:
            store: where the file is; read-only except on the primary process.
            key: key of the file.
            inputs_digest: of everything the results depend on; a file with another is ignored.
            broadcast: makes all processes agree on which batches are left.
        """
        self.key = key
        self._store = store
        self._inputs_digest = inputs_digest
        self._written = time.monotonic()
        self._has_changes = False
        self._batches: dict[str, list[Any]] = json.loads(broadcast(self._read))
        if self._batches:
            logs.get().info("resumed evaluation", file=key, batches=len(self._batches))

    def _read(self) -> str:
        content = self._store.read(self.key)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            document = json.loads(content or b"")
            if document["inputs"] == self._inputs_digest:
                return json.dumps(dict(document["batches"]))
        return "{}"

    def get(self, batch: int) -> list[Any] | None:
        """Return the results of a batch, or None."""
        return self._batches.get(str(batch))

    def add(self, batch: int, results: list[Any]) -> None:
        """Add the results of a batch, and write the file if the last write was long ago."""
        self._batches[str(batch)] = results
        self._has_changes = True
        if time.monotonic() - self._written >= CACHE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file if there are new results."""
        if self._has_changes:
            content = {"inputs": self._inputs_digest, "batches": self._batches}
            self._store.write(self.key, json.dumps(content, ensure_ascii=False).encode())
        self._has_changes = False
        self._written = time.monotonic()


class PredictionCaches:
    """The caches of all evaluations of one model: written on an error, deleted on success."""

    def __init__(
        self, store: Store, key_of: Callable[[str], str], inputs: object, broadcast: Broadcast
    ) -> None:
        """Prepare to open caches.

        Args:
            store: where the files are; read-only except on the primary process.
            key_of: returns the key of an evaluation's file.
            inputs: everything that the results, and how they are batched, depend on.
            broadcast: see `PredictionCache`.
        """
        self._store = store
        self._key_of = key_of
        self._inputs_digest = digest(inputs)
        self._broadcast = broadcast
        self._open: list[PredictionCache] = []

    def open(self, name: str) -> PredictionCache:
        """Return the cache of one evaluation."""
        for cache in self._open:
            cache.write()
        key = self._key_of(name)
        cache = PredictionCache(self._store, key, self._inputs_digest, self._broadcast)
        self._open.append(cache)
        return cache

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for cache in self._open:
            if kind is not None:
                with contextlib.suppress(JobError):  # the error that stopped the work matters more
                    cache.write()
            else:
                self._store.delete(cache.key)
