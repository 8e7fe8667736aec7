"""One policy for every call over a network: what is tried again, how soon, and for how long.

A failure that may pass (a lost connection, a stall, 408, 429 or 5xx, a reply that is not
whole) is `TransientError`; the work is tried again after a jittered, doubling wait, or after the
wait that the server asks for. Time without progress is bounded by `JOB_RETRY_SECONDS`. What
will not pass (401, 403, 404, 412, ...) is never tried again: see `job.storage.transfer.Refused`.
"""

import os
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from job.errors import SetupError, StageError
from job.runtime import logs
from job.runtime.watchdog import WATCHDOG

_FIRST_SECONDS = 0.5


_LONGEST_SECONDS = 20.0


_SLICE_SECONDS = 0.25


_PATIENCE_SECONDS = 300.0


_LONGEST_SHOWN = 200


class TransientError(Exception):
    """A try failed in a way that may pass; `after` is the wait that the server asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _Waiting:
    """What is called while a wait goes on, so that a stop need not wait for its end."""

    def __init__(self) -> None:
        self.check: Callable[[], None] = lambda: None


_WAITING = _Waiting()


def check_while_waiting(check: Callable[[], None]) -> None:
    """Call `check` during every wait and transfer from now on; it may raise."""
    _WAITING.check = check


def check_stop() -> None:
    """A place in long work where a stop does no harm."""
    _WAITING.check()


def seconds_from(variable: str, default: float) -> float:
    """A duration that the environment may set.

    Raises:
        EnvironmentProblem: it is no positive number.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise SetupError(f"{variable}={text!r}: write a number of seconds above 0")
    return value


def retry_after(value: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which holds seconds or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


class Attempts:
    """The tries of one piece of work, from the first failure since it last got on."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._patience = seconds_from("JOB_RETRY_SECONDS", _PATIENCE_SECONDS)
        self._count = 0
        self._since: float | None = None

    def progress(self) -> None:
        """Some of the work was done: count and clock begin again."""
        self._count = 0
        self._since = None
        WATCHDOG.beat()

    def failed(self, error: TransientError) -> None:
        """Wait before the next try.

        Raises:
            StageError: the time for this work is up.
        """
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._count += 1
        longest = min(_LONGEST_SECONDS, _FIRST_SECONDS * 2 ** (self._count - 1))
        wait = random.uniform(longest / 2, longest)
        if error.after is not None:
            wait = error.after + random.uniform(0, _FIRST_SECONDS)
        spent = now - self._since
        reason = " ".join(str(error).split())[:_LONGEST_SHOWN]
        if spent + wait > self._patience:
            asked = f", and is asked to wait {error.after:.0f} s" if error.after else ""
            raise StageError(
                f"cannot {self._what}: {reason}; given up after {self._count} "
                f"tr{'y' if self._count == 1 else 'ies'} in {spent:.0f} s{asked}; "
                "run the same command to resume"
            ) from error
        logs.get().warning(
            "trying again", what=self._what, reason=reason, tries=self._count, wait=round(wait, 1)
        )
        _sleep(wait)


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        _WAITING.check()
        time.sleep(min(left, _SLICE_SECONDS))


def retrying[Result](what: str, call: Callable[[], Result]) -> Result:
    """The result of `call`, tried again while it raises `TransientError`.

    Args:
        what: completes "cannot ...", for the log and the message of the end.

    Raises:
        StageError: the time is up.
    """
    tries = Attempts(what)
    while True:
        try:
            return call()
        except TransientError as error:
            tries.failed(error)
