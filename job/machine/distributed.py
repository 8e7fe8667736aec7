"""The processes of a multi-host job: they start, decide and exit together.

On a multi-host slice every host runs the same command. Only the primary process writes; it
broadcasts its decisions through the key-value store of JAX's coordination service. When a process
exits early, it tells the others why and all exit. A process that dies silently is detected by its
missing heartbeat.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from job.errors import (
    EXIT_ENVIRONMENT,
    EXIT_RESUMABLE,
    EXIT_STAGE,
    RunStoppedError,
    SetupError,
    StageError,
)
from job.runtime import logs
from job.runtime.signals import StopSignal, exit_now
from job.runtime.watchdog import WATCHDOG
from job.spec.schema import Runtime

_ADDRESS = "JOB_COORDINATOR_ADDRESS"
_COUNT = "JOB_PROCESS_COUNT"
_INDEX = "JOB_PROCESS_INDEX"

_RESUME = "run the same command to resume"
_EXITS, _HEARTBEATS = "job/left/", "job/beat/"
JOIN_SECONDS = 300
"""Seconds to wait for all processes."""

_POLL_SECONDS = 0.5
_HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a heartbeat after which a process counts as dead."""

_STOP_GRACE = 20.0
"""Seconds to stop cleanly after another process has stopped early."""

_FAILURE_GRACE = 2.0
"""Seconds to exit after another process has failed."""

_CLOSE_SECONDS = 5.0
"""Seconds for `before_exit`, in a process that is ended."""


class ProcessGroup:
    """This process among those of the job; the only one unless `join_processes` connects others."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index = index
        self.count = count
        self.before_exit: Callable[[], None] = lambda: None
        """Called before this process is ended because another one has exited."""
        self._client = client
        self._broadcasts = 0
        self._exiting = threading.Event()

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def broadcast(self, make: Callable[[], str], check: Callable[[], None] = lambda: None) -> str:
        """Return the primary's result of `make`, on every process.

        All processes must broadcast in the same order. Those that wait call `check` every second.
        """
        if self.count == 1:
            return make()
        self._broadcasts += 1
        key = f"job/shared/{self._broadcasts}"
        if self.is_primary:
            value = make()
            self._client.key_value_set(key, value)
            return value
        from jax.errors import JaxRuntimeError

        while True:
            check()
            WATCHDOG.beat()
            try:
                return str(self._client.blocking_key_value_get(key, 1000))
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise RunStoppedError(f"lost the connection to process 0; {_RESUME}") from error

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process; all must call this at the same point."""
        if self.count == 1:
            return flag
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.array(flag)).any())

    @contextlib.contextmanager
    def exit_together(self) -> Iterator[None]:
        """Within this block, exit when another process does, and tell them when this one does."""
        if self.count == 1:
            yield
            return
        watcher = threading.Thread(target=self._watch, name="processes", daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            self._exiting.set()
            self._announce(getattr(error, "exit_code", EXIT_STAGE), str(error))
            raise
        self._exiting.set()
        watcher.join()

    def _announce(self, code: int, message: str) -> None:
        """Publish why this process exits; the primary, which hosts the store, waits for all."""
        with contextlib.suppress(Exception):
            reason = json.dumps({"code": code, "message": message})
            self._client.key_value_set(f"{_EXITS}{self.index}", reason, allow_overwrite=True)
            until = time.monotonic() + 2 * _FAILURE_GRACE
            while self.is_primary and time.monotonic() < until:
                if len(self._client.key_value_dir_get(_EXITS)) == self.count:
                    break
                time.sleep(_POLL_SECONDS / 5)

    def peer_error(self, error: Exception) -> StageError | RunStoppedError | None:
        """Return the exit of another process that caused a device error here, if one did."""
        from jax.errors import JaxRuntimeError

        if self.count == 1 or not isinstance(error, JaxRuntimeError):
            return None
        until = time.monotonic() + 2 * _FAILURE_GRACE
        while time.monotonic() < until:
            with contextlib.suppress(JaxRuntimeError):
                if peer := self._peer_exit():
                    code, message = peer
                    resumable = code == EXIT_RESUMABLE
                    return RunStoppedError(message) if resumable else StageError(message)
            time.sleep(_POLL_SECONDS)
        return RunStoppedError(f"lost the connection to another process; {_RESUME}")

    def _peer_exit(self) -> tuple[int, str] | None:
        """Return the exit code and message of the first process that has exited."""
        for key, value in self._client.key_value_dir_get(_EXITS):
            reason = json.loads(value)
            return int(reason["code"]), f"process {_index(key)} has exited: {reason['message']}"
        return None

    def _watch(self) -> None:
        last: dict[str, tuple[str, float]] = {}
        beat = 0
        while not self._exiting.wait(_POLL_SECONDS):
            beat += 1
            try:
                key = f"{_HEARTBEATS}{self.index}"
                self._client.key_value_set(key, str(beat), allow_overwrite=True)
                peer, beats = self._peer_exit(), self._client.key_value_dir_get(_HEARTBEATS)
            except Exception:
                message = "lost the connection to process 0"
                self._exit_after(_FAILURE_GRACE, EXIT_RESUMABLE, message)
                return
            if peer:
                grace = _STOP_GRACE if peer[0] == EXIT_RESUMABLE else _FAILURE_GRACE
                self._exit_after(grace, *peer)
                return
            now = time.monotonic()
            for key, value in beats:
                if last.get(key, ("", 0))[0] != value:
                    last[key] = (value, now)
                elif now - last[key][1] > _HEARTBEAT_TIMEOUT:
                    self._exit_after(0, EXIT_RESUMABLE, f"process {_index(key)} stopped responding")
                    return

    def _exit_after(self, grace: float, code: int, message: str) -> None:
        """End this process unless it exits by itself within `grace` seconds."""
        if not self._exiting.wait(grace):
            if code == EXIT_RESUMABLE and _RESUME not in message:
                message = f"{message}; {_RESUME}"
            self.leave(code, message)

    def leave(self, code: int, message: str) -> None:
        """End this process now, whatever its main thread is doing, and tell the others why."""
        level = logging.WARNING if code == EXIT_RESUMABLE else logging.ERROR
        logs.get().log(level, message, stage=WATCHDOG.stage)
        with contextlib.suppress(Exception):
            reason = json.dumps({"code": code, "message": message})
            self._client.key_value_set(f"{_EXITS}{self.index}", reason)
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
        """Whether this process has a stop request."""
        return self.signal.requested is not None

    def check(self) -> None:
        """Raise if any process has a stop request; all processes must call this together.

        Raises:
            RunStoppedError: the job stops here.
        """
        if self.processes.any(self.requested):
            self.signal.check()
            raise RunStoppedError("stopped with another process; run the same command to resume")


def _index(key: str) -> str:
    return key.rpartition("/")[2]


def join_processes(runtime: Runtime) -> ProcessGroup:
    """Connect to the other processes of the job, and wait for all of them.

    Call this before anything asks JAX for its devices.

    Raises:
        SetupError: the environment is incomplete, or its address is wrong. If not all processes
            connect in time, this process ends with the same exit code.
    """
    arguments = _initialize_arguments(runtime)
    if arguments is None:
        return ProcessGroup()
    import jax
    from jax._src.distributed import global_state

    # At its own timeout JAX aborts the process.
    message = f"not all processes of the job connected within {JOIN_SECONDS} s"
    if arguments:
        message = f"process {os.environ[_INDEX]} of {os.environ[_COUNT]}: {message}"
    deadline = threading.Timer(JOIN_SECONDS, ProcessGroup().leave, (EXIT_ENVIRONMENT, message))
    deadline.daemon = True
    deadline.start()
    try:
        for name, value in (
            ("jax_cpu_collectives_implementation", "gloo"),
            ("jax_enable_preemption_service", False),  # it would handle SIGTERM itself
        ):
            jax.config.update(name, value)  # type: ignore[no-untyped-call]
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * JOIN_SECONDS,
            # Longer than ours, because JAX's own watcher ends the process without a message.
            heartbeat_timeout_seconds=int(4 * _HEARTBEAT_TIMEOUT),
            shutdown_timeout_seconds=10,
        )
    except ValueError as error:
        if not arguments:  # the platform reports no other hosts
            return ProcessGroup()
        raise SetupError(f"{_ADDRESS}: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(f"cannot connect to the other processes of the job: {reason}") from error
    finally:
        deadline.cancel()
    return ProcessGroup(jax.process_index(), jax.process_count(), global_state.client)


def _initialize_arguments(runtime: Runtime) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`.

    {} lets JAX detect them on the platform; None: this is the only process.
    """
    address = os.environ.get(_ADDRESS)
    if address is None:
        on_tpu = os.environ.get("JAX_PLATFORMS", "").startswith("tpu")
        return {} if on_tpu or runtime.platform == "tpu" else None
    count, index = os.environ.get(_COUNT, ""), os.environ.get(_INDEX, "")
    try:
        processes, process = int(count), int(index)
    except ValueError:
        raise SetupError(
            f"{_COUNT} and {_INDEX} must be numbers; they are {count!r} and {index!r}"
        ) from None
    if not 0 <= process < processes:
        raise SetupError(f"{_INDEX}: process {index} is not one of {count}; indices start at 0")
    return {"coordinator_address": address, "num_processes": processes, "process_id": process}
