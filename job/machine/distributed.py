"""Several processes as one job: they begin, decide and leave together.

On a multi-host slice every machine runs the same command. The first process leads: it alone
writes, and what it decides reaches the others through the key-value store of JAX's
coordination service. When one leaves for any reason but success, all do: the others are told
why, and one that vanished without a word is missed by its heartbeat.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from job.errors import EXIT_RESUMABLE, EXIT_STAGE, RunStoppedError, SetupError, StageError
from job.runtime import logs
from job.runtime.signals import StopSignal, exit_now
from job.runtime.watchdog import WATCHDOG
from job.spec.schema import Distributed, Runtime

_ADDRESS, _COUNT, _INDEX = (
    "JOB_COORDINATOR_ADDRESS",
    "JOB_PROCESS_COUNT",
    "JOB_PROCESS_INDEX",
)


_LEFT, _BEAT = "job/left/", "job/beat/"


_JOIN_SECONDS = 300


_LOOK_SECONDS = 0.5


_MISSED_SECONDS = 30.0
"""Silence after which a process counts as gone."""


_GRACE_SECONDS = {EXIT_RESUMABLE: 20.0}
"""Time to leave in good order after another has left with this code; others: `_GRACE`."""


_GRACE = 2.0


_CLOSE_SECONDS = 5.0
"""Time to keep the log and to give the run back, for a process that is ended."""


class ProcessGroup:
    """This process among those of the job; alone unless `join_processes` found others."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index = index
        self.count = count
        self.before_exit: Callable[[], None] = lambda: None
        """Called before this process is ended because another one has left."""
        self._client = client
        self._shared = 0
        self._leaving = threading.Event()

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def broadcast(self, make: Callable[[], str], check: Callable[[], None] = lambda: None) -> str:
        """What `make` gives on the leader, on every process.

        All processes must share in the same order. Those that wait call `check` each second.
        """
        if self.count == 1:
            return make()
        self._shared += 1
        key = f"job/shared/{self._shared}"
        if self.is_primary:
            value = make()
            self._client.key_value_set(key, value)
            return value
        while True:
            check()
            WATCHDOG.beat()
            found = _timed(lambda: self._client.blocking_key_value_get(key, 1000))
            if found is not None:
                return str(found)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must ask at the same point."""
        if self.count == 1:
            return flag
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(flag)).any())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within this block, leave when another process does, and tell them when this one does."""
        if self.count == 1:
            yield
            return
        watcher = threading.Thread(target=self._watch, name="processes", daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            self._leaving.set()
            self._tell(getattr(error, "exit_code", EXIT_STAGE), str(error))
            raise
        self._leaving.set()
        watcher.join()

    def _tell(self, code: int, message: str) -> None:
        """Say why this process leaves; the leader, who keeps the store, waits for the others."""
        with contextlib.suppress(Exception):
            reason = json.dumps({"code": code, "message": message})
            self._client.key_value_set(f"{_LEFT}{self.index}", reason, allow_overwrite=True)
            until = time.monotonic() + 2 * _GRACE
            while self.is_primary and time.monotonic() < until:
                if len(self._client.key_value_dir_get(_LEFT)) == self.count:
                    break
                time.sleep(_LOOK_SECONDS / 5)

    def lost(self, error: Exception) -> StageError | RunStoppedError | None:
        """What an error of the devices means among several: another process has left."""
        from jax.errors import JaxRuntimeError

        if self.count == 1 or not isinstance(error, JaxRuntimeError):
            return None
        until = time.monotonic() + 2 * _GRACE
        while time.monotonic() < until:
            with contextlib.suppress(JaxRuntimeError):
                for key, value in self._entries(_LEFT):
                    reason = json.loads(value)
                    message = f"process {_number(key)} has left: {reason['message']}"
                    if reason["code"] == EXIT_RESUMABLE:
                        return RunStoppedError(message)
                    return StageError(message)
            time.sleep(_LOOK_SECONDS)
        return RunStoppedError(
            "lost the connection to another process; run the same command to resume"
        )

    def _own(self, folder: str) -> str:
        return f"{folder}{self.index}"

    def _entries(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self._client.key_value_dir_get(folder)]

    def _watch(self) -> None:
        heard: dict[str, tuple[str, float]] = {}
        beat = 0
        while not self._leaving.wait(_LOOK_SECONDS):
            beat += 1
            try:
                self._client.key_value_set(self._own(_BEAT), str(beat), allow_overwrite=True)
                left, beats = self._entries(_LEFT), self._entries(_BEAT)
            except Exception:
                self._exit(EXIT_RESUMABLE, "lost the connection to process 0", _GRACE)
                return
            for key, value in left:
                reason = json.loads(value)
                message = f"process {_number(key)} has left: {reason['message']}"
                grace = _GRACE_SECONDS.get(reason["code"], _GRACE)
                self._exit(reason["code"], message, grace)
                return
            now = time.monotonic()
            for key, value in beats:
                if heard.get(key, ("", 0))[0] != value:
                    heard[key] = (value, now)
                elif now - heard[key][1] > _MISSED_SECONDS:
                    self._exit(EXIT_RESUMABLE, f"process {_number(key)} is gone", 0)
                    return

    def _exit(self, code: int, message: str, grace: float) -> None:
        """End this process, unless it ends by itself within the time of grace."""
        if not self._leaving.wait(grace):
            self.leave(code, f"{message}; run the same command to resume")

    def leave(self, code: int, message: str) -> None:
        """End this process now, whatever its main thread is in; the others are told why."""
        level = logging.WARNING if code == EXIT_RESUMABLE else logging.ERROR
        logs.get().log(level, message, stage=WATCHDOG.stage)
        with contextlib.suppress(Exception):
            reason = json.dumps({"code": code, "message": message})
            self._client.key_value_set(self._own(_LEFT), reason)
        closing = threading.Thread(target=self.before_exit, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        exit_now(code, message)


class CoordinatedStop:
    """A stop request that all processes of the job act on at the same point."""

    def __init__(self, signal: StopSignal, processes: ProcessGroup) -> None:
        self.signal = signal
        self.processes = processes

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal.requested is not None

    def check(self) -> None:
        """Raise if any process was asked to stop; all processes must call this together.

        Raises:
            RunStoppedError: the job stops here.
        """
        if self.processes.any(self.requested):
            self.signal.check()
            raise RunStoppedError("stopped with another process; run the same command to resume")


def _number(key: str) -> str:
    return key.rpartition("/")[2]


def _timed(get: Callable[[], Any]) -> Any:
    """The answer of a blocking call, or None if its time was up."""
    from jax.errors import JaxRuntimeError

    try:
        return get()
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise RunStoppedError(
            "lost the connection to process 0; run the same command to resume"
        ) from error


def is_joined() -> bool:
    """Whether this process is one of several."""
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.num_processes > 1


def join_processes(wanted: Runtime) -> ProcessGroup:
    """Find the other processes of the job, and wait until all have come.

    Must come before anything asks JAX for its devices.

    Raises:
        EnvironmentProblem: what the spec or the environment says is incomplete, or the others
            did not come in time.
    """
    place = _place(wanted)
    if place is None:
        return ProcessGroup()
    import jax
    from jax._src.distributed import global_state

    try:
        for name, value in (
            ("jax_cpu_collectives_implementation", "gloo"),
            ("jax_enable_preemption_service", False),  # it would take SIGTERM for itself
        ):
            jax.config.update(name, value)  # type: ignore[no-untyped-call]
        jax.distributed.initialize(
            **place,
            initialization_timeout=_JOIN_SECONDS,
            # Longer than ours: JAX's own watcher ends the process without a word.
            heartbeat_timeout_seconds=int(4 * _MISSED_SECONDS),
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        if not place:  # nothing says that this machine is one of several
            return ProcessGroup()
        raise SetupError(f"runtime.distributed: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(
            f"runtime.distributed: not all processes came within {_JOIN_SECONDS} s: {reason}"
        ) from error
    return ProcessGroup(jax.process_index(), jax.process_count(), global_state.client)


def _place(wanted: Runtime) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; {} to ask the platform, None to be alone."""
    said = wanted.distributed
    if said == "off":
        return None
    address, count = os.environ.get(_ADDRESS), os.environ.get(_COUNT)
    index: str | int | None = os.environ.get(_INDEX)
    if isinstance(said, Distributed):
        address, count = said.address, str(said.processes)
        index = said.index if said.index is not None else index
    elif address is None:
        named = os.environ.get("JAX_PLATFORMS", "").startswith("tpu")
        return {} if named or wanted.platform == "tpu" else None
    try:
        place = {
            "coordinator_address": address,
            "num_processes": int(count or ""),
            "process_id": int("" if index is None else index),
        }
    except ValueError:
        raise SetupError(
            f"runtime.distributed: {_COUNT} and {_INDEX} must be numbers; "
            f"they are {count!r} and {index!r}"
        ) from None
    if not 0 <= place["process_id"] < place["num_processes"]:  # type: ignore[operator]
        raise SetupError(
            f"runtime.distributed: process {index} is not one of {count}; they count from 0"
        )
    return place
