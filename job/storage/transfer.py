"""HTTP as the job uses it: whole replies or none, and what of its failures may pass.

A `Client` is a connection pool with the credentials of one service. A reply is either one that
the caller says it can use, or a failure that may pass, or it is `RefusedError`. Large bodies go to
a file: see `job.storage.partial`.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import StageError
from job.storage.partial import Arriving, Content, bring
from job.storage.retry import TransientError, retry_after, seconds_from

if TYPE_CHECKING:
    import requests


_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})


_STALL_SECONDS = 30.0


_PIECE = 512 * 1024


class RefusedError(Exception):
    """An answer that no second try would change."""

    def __init__(self, status: int, headers: Mapping[str, str], text: str) -> None:
        super().__init__(f"{status}: {first_line(text)}" if text else str(status))
        self.status = status
        self.headers = headers
        self.text = text


@dataclass(frozen=True)
class HttpReply:
    """A whole reply; the names of headers are in lower case."""

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
            raise TransientError("the reply is not valid JSON") from None


def first_line(text: str) -> str:
    """A text shortened to one line."""
    return " ".join(text.split())[:200]


def timeouts() -> tuple[float, float]:
    """Seconds to wait for a connection, and for the next byte (`JOB_STALL_SECONDS`)."""
    stall = seconds_from("JOB_STALL_SECONDS", _STALL_SECONDS)
    return min(stall, 10.0), stall


def widen(session: "requests.Session") -> None:
    """Let a session keep as many connections as there are transfers at once."""
    from requests.adapters import HTTPAdapter

    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=16))


def raise_if_transient(response: "requests.Response") -> None:
    """Raise `TransientError` if the status is one that may pass."""
    if response.status_code in _RETRYABLE:
        after = retry_after(response.headers.get("Retry-After"))
        raise TransientError(f"{response.status_code} {response.reason}", after)


@contextlib.contextmanager
def lost_connections() -> Iterator[None]:
    """Within this block a connection that is lost, or stalls, is `TransientError`.

    Raises:
        StageError: an address is none.
    """
    import requests
    import urllib3
    from google.auth.exceptions import TransportError

    wrong = requests.exceptions
    try:
        yield
    except (wrong.InvalidURL, wrong.MissingSchema, wrong.InvalidSchema) as error:
        raise StageError(f"there is a wrong address: {error}") from error
    except (
        wrong.RequestException,
        urllib3.exceptions.HTTPError,
        TransportError,
        ConnectionError,
    ) as error:
        raise TransientError(_reason(error)) from error


class Client:
    """One service over HTTP, with a session that carries its credentials."""

    def __init__(self, session: "requests.Session") -> None:
        self._session = session
        widen(session)

    def get(self, url: str) -> HttpReply:
        """The whole reply to one request, tried only once.

        Raises:
            Transient: it failed in a way that may pass.
            Refused: the service says no.
        """
        with self._open(url, (200,)) as response:
            content = response.content
            return HttpReply(
                {name.lower(): value for name, value in response.headers.items()}, content
            )

    @contextlib.contextmanager
    def _open(
        self, url: str, ok: Collection[int], headers: Mapping[str, str] | None = None
    ) -> Iterator["requests.Response"]:
        """An open response with one of the statuses `ok`.

        Raises:
            Transient: it failed in a way that may pass, in here or inside the block.
            Refused: any other status.
        """
        with (
            lost_connections(),
            self._session.get(url, headers=headers, stream=True, timeout=timeouts()) as response,
        ):
            raise_if_transient(response)
            if response.status_code not in ok:
                raise RefusedError(response.status_code, response.headers, response.text)
            yield response

    def download(self, what: str, url: str, path: Path, content: Content) -> None:
        """Bring a file to `path`: see `job.storage.partial.bring`.

        Raises:
            Refused: the service says no.
            StageError: the time is up, the disk is full, or the content is wrong every time.
        """
        bring(what, path, content, lambda file: self._append(url, file))

    def _append(self, url: str, file: Arriving) -> None:
        wanted, have = {"Accept-Encoding": "identity"}, file.have
        if have:
            wanted["Range"] = f"bytes={have}-"
        with self._open(url, (200, 206, 416), wanted) as response:
            if response.status_code == 416:
                file.restart()
                raise TransientError("the service has less of the file than it said")
            said = response.headers.get("Content-Range", "")
            if have and (response.status_code == 200 or not said.startswith(f"bytes {have}-")):
                file.restart()
                if response.status_code == 206:
                    raise TransientError("another part of the file came than was asked for")
            for piece in response.iter_content(_PIECE):
                file.write(piece)


def _reason(error: Exception) -> str:
    """The innermost reason, without the addresses of objects that HTTP libraries print."""
    kind = type(error).__name__
    if "timeout" in kind.lower() or "timed out" in str(error):
        return "no answer in time"
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    reason = getattr(inner, "reason", None) or inner
    text = str(reason).rpartition(">: ")[2]
    return f"{kind}: {text}"
