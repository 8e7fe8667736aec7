"""The one retry policy for network calls: what is retried, how soon, and for how long.

A failure that may pass (a lost connection, a stall, HTTP 408, 429 or 5xx, an incomplete reply) is
a `TransientError`: the call is repeated after a jittered, doubling wait, or after the wait the
server requests. Time without progress is limited by `JOB_RETRY_SECONDS`, and the time until the
next byte of a reply by `JOB_STALL_SECONDS`.
"""

import os
import random
import time
from collections.abc import Callable, Iterable
from email.utils import parsedate_to_datetime

from job.errors import SetupError, StageError
from job.runtime import logs
from job.runtime.signals import STOP
from job.runtime.watchdog import WATCHDOG
from job.storage.certificates import certificate_problem

TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 20.0
_SLICE_SECONDS = 0.25
_RETRY_SECONDS = 300.0
_STALL_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_MAX_REPLY_BYTES = 64_000_000
_REPLY_STALLS = 4
"""A reply that is no file may take this many times as long as the wait for its next byte."""


class TransientError(Exception):
    """A failure that may pass; `after` is the wait in seconds that the server requests."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def seconds_from(variable: str, default: float) -> float:
    """Return a duration that the environment may set.

    Raises:
        SetupError: the variable is not a positive number.
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


def timeouts() -> tuple[float, float]:
    """Return the seconds to wait for a connection, and for the next byte of a reply."""
    stall = seconds_from("JOB_STALL_SECONDS", _STALL_SECONDS)
    return min(stall, _CONNECT_SECONDS), stall


def retry_after(value: str | None) -> float | None:
    """Parse a `Retry-After` header, which has seconds or a date; None if it is missing or bad."""
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


def raise_if_transient(status: int, reason: str, after: str | None) -> None:
    """Raise `TransientError` for an HTTP status that may pass; `after` is its `Retry-After`."""
    if status in TRANSIENT_STATUSES:
        raise TransientError(f"{status} {reason}", retry_after(after))


def read_reply(chunks: Iterable[bytes], address: str) -> bytes:
    """Return the body of a reply that is no file, from its decompressed chunks.

    Raises:
        StageError: it is larger than any such reply.
        TransientError: it is not complete in time.
    """
    seconds = _REPLY_STALLS * timeouts()[1]
    deadline = time.monotonic() + seconds
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > _MAX_REPLY_BYTES:
            limit = _MAX_REPLY_BYTES // 1_000_000
            raise StageError(f"{address} replies with more than {limit} MB of metadata")
        if time.monotonic() > deadline:
            raise TransientError(f"the reply is not complete after {seconds:.0f} s")
    return bytes(content)


def first_line(text: str) -> str:
    """Shorten a text to one line of at most 200 characters."""
    return " ".join(text.split())[:200]


def report_progress() -> None:
    """Tell the watchdog that bytes moved; raise if a stop was requested.

    Raises:
        RunStoppedError: a stop was requested.
    """
    STOP.check()
    WATCHDOG.beat()


class Attempts:
    """The attempts at one piece of work, counted from the first failure since its last progress."""

    def __init__(self, what: str) -> None:
        """Count attempts at `what`, which completes "cannot ..." in messages."""
        self._what = what
        self._patience = seconds_from("JOB_RETRY_SECONDS", _RETRY_SECONDS)
        self._count = 0
        self._since: float | None = None

    def progress(self) -> None:
        """Reset the count and the clock: some of the work is done."""
        self._count = 0
        self._since = None
        report_progress()

    def run[Result](self, call: Callable[[], Result]) -> Result:
        """Return the result of `call`, repeated while it raises `TransientError`.

        Raises:
            StageError: the time is up.
            SetupError: the server's certificate is not trusted.
        """
        while True:
            try:
                return call()
            except TransientError as error:
                if problem := certificate_problem(error):
                    raise SetupError(f"cannot {self._what}: {problem}") from error
                self._wait(error)

    def _wait(self, error: TransientError) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._count += 1
        longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** (self._count - 1))
        wait = random.uniform(longest / 2, longest)
        if error.after is not None:
            wait = error.after + random.uniform(0, _FIRST_WAIT_SECONDS)
        spent = now - self._since
        reason = first_line(str(error))
        if spent + wait > self._patience:
            requested = f" (the server requests {error.after:.0f} s)" if error.after else ""
            raise StageError(
                f"cannot {self._what}: {reason}; gave up after {self._count} "
                f"attempt{'' if self._count == 1 else 's'} in {spent:.0f} s{requested}; "
                "run the same command to resume"
            ) from error
        logs.get().warning(
            "retrying",
            what=self._what,
            reason=reason,
            attempts=self._count,
            wait_seconds=round(wait, 1),
        )
        until = now + wait
        while (left := until - time.monotonic()) > 0:
            STOP.check()
            time.sleep(min(left, _SLICE_SECONDS))
