"""HTTP as the job uses it: whole replies or none, downloads that resume, one retry policy.

A `Client` is a connection pool with the credentials of one service. A reply is either one that
the caller says it can use, or it is tried again, or it is `Refused`. Large bodies go to a file
beside which a stopped download leaves what it has; the next one begins there.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import StageError
from job.pulse import PULSE
from job.retry import Transient, Tries, retry_after, retrying, seconds_from, stop_point

if TYPE_CHECKING:
    import requests

PARTIAL = ".partial-"
"""Begins the names of files that are not whole yet."""

_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
_STALL_SECONDS = 30.0
_PIECE = 256 * 1024
_MISMATCHES = 3
"""Times that a file may come with the wrong content before the source is taken to be wrong."""


class Refused(Exception):
    """An answer that no second try would change."""

    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        super().__init__(f"{status}: {_first_line(text)}" if text else str(status))
        self.status = status
        self.headers = headers
        self.text = text


@dataclass(frozen=True)
class Reply:
    """A whole reply; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """The content as JSON.

        Raises:
            Transient: it is none, so it was damaged on the way.
        """
        try:
            return json.loads(self.content)
        except ValueError:
            raise Transient("the reply is not valid JSON") from None


def _first_line(text: str) -> str:
    return " ".join(text.split())[:200]


class Client:
    """One service over HTTP, with a session that carries its credentials."""

    def __init__(
        self,
        session: "requests.Session",
        passing: Callable[[int, str], bool] = lambda status, text: False,
    ) -> None:
        """`passing` says whether a refusal, by status and text, may pass."""
        from requests.adapters import HTTPAdapter

        stall = seconds_from("JOB_STALL_SECONDS", _STALL_SECONDS)
        self._session = session
        self._passing = passing
        self._timeout = (min(stall, 10.0), stall)
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=16))

    def call(
        self,
        what: str,
        method: str,
        url: str,
        *,
        ok: Collection[int] = (200,),
        check: Callable[[Reply], None] = lambda reply: None,
        **arguments: Any,
    ) -> Reply:
        """The reply to one request whose body is in memory, tried again where that may help.

        Args:
            check: raises `Transient` if the reply is not what it should be.

        Raises:
            Refused: the service says no.
            StageError: the time is up.
        """

        def once() -> Reply:
            reply = self.once(method, url, ok=ok, **arguments)
            check(reply)
            return reply

        return retrying(what, once)

    def once(
        self, method: str, url: str, *, ok: Collection[int] = (200,), **arguments: Any
    ) -> Reply:
        """The same, tried only once."""
        with self._open(method, url, ok=ok, **arguments) as response:
            content = response.content
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status_code, headers, content)

    @contextlib.contextmanager
    def _open(
        self, method: str, url: str, *, ok: Collection[int], **arguments: Any
    ) -> Iterator["requests.Response"]:
        """An open response with one of the statuses `ok`.

        Raises:
            Transient: it failed in a way that may pass, in here or inside the block.
            Refused: any other status.
        """
        import requests
        import urllib3
        from google.auth.exceptions import TransportError

        try:
            response = self._session.request(
                method, url, stream=True, timeout=self._timeout, **arguments
            )
            with response:
                status = response.status_code
                if status in _RETRYABLE:
                    after = retry_after(response.headers.get("Retry-After"))
                    raise Transient(f"{status} {response.reason}", after)
                if status not in ok:
                    if self._passing(status, response.text):
                        raise Transient(_first_line(response.text))
                    raise Refused(status, response.headers, response.text)
                yield response
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
            raise StageError(f"{url} is no address: {error}") from error
        except (
            requests.exceptions.RequestException,
            urllib3.exceptions.HTTPError,
            TransportError,
            ConnectionError,
        ) as error:
            raise Transient(_reason(error)) from error

    def download(
        self,
        what: str,
        url: str,
        path: Path,
        *,
        size: int,
        is_right: Callable[[Path], bool],
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Bring a file of `size` bytes to `path`, which appears only once `is_right` holds.

        What an interrupted download has got is kept beside it, and the next one goes on there;
        two processes that want the same file take turns.

        Raises:
            Refused: the service says no.
            StageError: the time is up, the disk is full, or the content is wrong every time.
        """
        partial = path.with_name(PARTIAL + path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if path.is_file():  # another process was faster
                    partial.unlink(missing_ok=True)
                    return
                self._fill(what, url, partial, file, size, is_right, headers or {}, params)
                partial.replace(path)
        except OSError as error:
            raise StageError(f"cannot write {path}: {error.strerror or error}") from error

    def _fill(
        self,
        what: str,
        url: str,
        partial: Path,
        file: Any,
        size: int,
        is_right: Callable[[Path], bool],
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
    ) -> None:
        tries, wrong = Tries(what), 0
        while True:
            have = os.fstat(file.fileno()).st_size
            try:
                if have > size:
                    file.truncate(0)
                    have = 0
                if have < size:
                    self._append(url, file, have, size, headers, params)
                file.flush()
                if is_right(partial):
                    return
                file.truncate(0)
                wrong += 1
                if wrong == _MISMATCHES:
                    raise StageError(
                        f"cannot {what}: {wrong} times its content did not have the checksum it "
                        "should have; the file is damaged at its source"
                    )
                raise Transient("the content does not have its checksum")
            except Transient as error:
                if os.fstat(file.fileno()).st_size > have:
                    tries.progress()
                tries.failed(error)

    def _append(
        self,
        url: str,
        file: Any,
        have: int,
        size: int,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
    ) -> None:
        wanted = {**headers, "Accept-Encoding": "identity"}
        if have:
            wanted["Range"] = f"bytes={have}-"
        with self._open("GET", url, ok=(200, 206, 416), headers=wanted, params=params) as response:
            if response.status_code == 416:
                file.truncate(0)
                raise Transient("the service has less of the file than it said")
            said = response.headers.get("Content-Range", "")
            if have and (response.status_code == 200 or not said.startswith(f"bytes {have}-")):
                file.truncate(0)
                if response.status_code == 206:
                    raise Transient("another part of the file came than was asked for")
                have = 0
            try:
                for piece in response.iter_content(_PIECE):
                    stop_point()
                    PULSE.beat()
                    file.write(piece[: size - have])
                    have += len(piece)
            finally:
                file.flush()
        if have < size:
            raise Transient(f"the file ended after {have} of {size} bytes")
        if have > size:
            file.truncate(0)
            raise Transient(f"{have} bytes came instead of {size}")


def _reason(error: Exception) -> str:
    """The innermost reason, without the addresses of objects that HTTP libraries print."""
    kind = type(error).__name__
    if "timeout" in kind.lower() or "timed out" in str(error):
        return "no answer in time"
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    reason = getattr(inner, "reason", None) or inner
    text = str(reason).rpartition(">: ")[2]
    return f"{kind}: {text}"
