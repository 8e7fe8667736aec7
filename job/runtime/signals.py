"""SIGTERM and SIGINT: a graceful stop during a run, an immediate one otherwise.

Both are blocked in every thread, and one thread waits for them. So a stop is handled while the
main thread is in an import or in the compiler, and one that arrives while Python starts is not
lost: the container's entrypoint blocks the signals before it starts Python.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from job.errors import EXIT_RESUMABLE, RunStoppedError

GRACE_SECONDS = 12.0
"""Time for a graceful stop; Docker is told to wait for 25 seconds."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_now(code: int, message: str = "") -> NoReturn:
    """End this process immediately, without waiting for threads or cleaning up."""
    if message:
        sys.stderr.write(f"error: {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopSignal:
    """A request to stop, raised as `RunStoppedError` where the work calls `check`.

    An exception at an arbitrary point can be swallowed, or break the state of a library, so the
    request is only recorded, and loops call `check` in each iteration. `leave` ends a process that
    has not ended after `grace` seconds, or that gets a second SIGINT.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.muted = False
        """If true, `check` does not raise, so that final writes can finish."""
        self.grace = 0.0
        """Seconds; 0 outside of a run."""
        self.leave: Callable[[int, str], None] = exit_now
        self._interactive = False

    def install(self) -> None:
        """Handle the signals from now on; existing threads must block them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Give a stop within this block time to save the run."""
        self.grace = GRACE_SECONDS
        try:
            yield
        finally:
            self.grace = 0.0

    @contextlib.contextmanager
    def interactive(self) -> Iterator[None]:
        """Let Ctrl-C raise `KeyboardInterrupt` in the main thread within this block."""
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._interactive = True
        try:
            yield
        finally:
            self._interactive = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _listen(self) -> None:
        while (number := signal.sigwait(_SIGNALS)) == signal.SIGINT and self._interactive:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        self.requested = signal.Signals(number).name
        threading.Thread(target=self._exit_on_second_sigint, name="stop-now", daemon=True).start()
        time.sleep(self.grace)
        self.leave(EXIT_RESUMABLE, self._message)

    def _exit_on_second_sigint(self) -> None:
        while signal.sigwait(_SIGNALS) != signal.SIGINT:
            continue
        self.leave(EXIT_RESUMABLE, self._message)

    @property
    def _message(self) -> str:
        return f"stopped by {self.requested}; run the same command to resume"

    def check(self) -> None:
        """Check for a request to stop.

        Raises:
            RunStoppedError: a stop was requested.
        """
        if self.requested and not self.muted:
            raise RunStoppedError(self._message)


STOP = StopSignal()
"""The stop signal of this process."""
