"""SIGTERM and SIGINT: a stop in good order where there is something to keep, else at once.

Both are blocked in every thread, and one thread waits for them. So a stop is heard while the
main thread is in an import or in the compiler, and one that came while Python was starting is
not lost: the container's entrypoint blocks the signals before there is a Python.
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
"""Time to leave in good order; Docker is told to wait for 25 seconds."""


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_now(code: int, message: str = "") -> NoReturn:
    """End this process at once: no thread is waited for, and nothing is cleaned up."""
    if message:
        sys.stderr.write(f"error: {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopSignal:
    """A request to stop, turned into `RunStoppedError` where the work says that it does no harm.

    An exception out of nowhere can be swallowed, or leave a library in pieces, so the request is
    only noted, and loops call `check` each time round. What has not ended after `grace` seconds,
    or when a second SIGINT comes, is ended by `leave`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.muted = False
        """Whether `check` lets the last calls before the exit pass."""
        self.grace = 0.0
        """0 while there is nothing to keep."""
        self.leave: Callable[[int, str], None] = exit_now
        self._conversing = False

    def install(self) -> None:
        """Listen to the signals from now on; threads that are there already must block them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Within this block there is something to keep, and a stop is given time for it."""
        self.grace = GRACE_SECONDS
        try:
            yield
        finally:
            self.grace = 0.0

    @contextlib.contextmanager
    def interactive(self) -> Iterator[None]:
        """Within this block Ctrl-C is Python's own `KeyboardInterrupt` in the main thread."""
        before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._conversing = True
        try:
            yield
        finally:
            self._conversing = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _listen(self) -> None:
        while (number := signal.sigwait(_SIGNALS)) == signal.SIGINT and self._conversing:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        self.requested = signal.Signals(number).name
        threading.Thread(target=self._leave_at_ctrl_c, name="stop-now", daemon=True).start()
        time.sleep(self.grace)
        self.leave(EXIT_RESUMABLE, self._message)

    def _leave_at_ctrl_c(self) -> None:
        while signal.sigwait(_SIGNALS) != signal.SIGINT:
            continue
        self.leave(EXIT_RESUMABLE, self._message)

    @property
    def _message(self) -> str:
        return f"stopped by {self.requested}; run the same command to resume"

    def check(self) -> None:
        """Raise if a stop was requested."""
        if self.requested and not self.muted:
            raise RunStoppedError(self._message)


STOP = StopSignal()
"""The stop of this process: signals belong to the whole of it."""
