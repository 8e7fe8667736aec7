"""What the stand-in services share: a real HTTP/1.1 server on loopback, a log, and faults.

A test starts a `Service` as a context manager, points the real client at its `url`, and reads
`requests` afterwards. Faults are injected from outside, so that what a client does about a 503
or a connection cut in the middle of a body is shown over a socket, not assumed by a mock.

Left out: TLS, HTTP/2, compression, chunked request bodies (answered 411) and multi-range
requests. Bodies are held in memory, in both directions.
"""

import json
import re
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from tests.services.faults import Faults, Spoil

_BYTE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Request:
    """A logged request; the names of `headers` are case-insensitive."""

    method: str
    path: str
    headers: Message
    length: int

    @property
    def route(self) -> str:
        """The path as sent, still percent-encoded, without the query."""
        return urlsplit(self.path).path

    @property
    def query(self) -> dict[str, str]:
        """The query's decoded parameters; the last one wins where a name is repeated."""
        return dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))

    @property
    def bearer(self) -> str | None:
        """The token of an `Authorization: Bearer` header, or None."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" and token else None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Reply:
    """An answer, complete or cut; `Faults.add` describes `cut_after`."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    spoil: Spoil = "none"


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply that carries `value` as JSON."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Reply(status, json.dumps(value).encode(), {**kind, **(headers or {})})


def ranged_reply(data: bytes, byte_range: str | None, headers: Mapping[str, str]) -> Reply:
    """Serve `data`, or the part of it that a single `Range` requests: 200, 206 or 416."""
    headers = {"Accept-Ranges": "bytes", **headers}
    match = _BYTE_RANGE.fullmatch(byte_range or "")
    if match is None or match.groups() == ("", ""):
        return Reply(200, data, headers)
    size, (first, last) = len(data), match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if first and last and int(last) < int(first):
        return Reply(200, data, headers)
    if start >= size:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    part = data[start : end + 1]
    return Reply(206, part, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "_Server"

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send(Reply(411))
        elif len(body) == length:
            request = Request(self.command, self.path, self.headers, length)
            self._send(self.server.service.handle(request, body))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _send(self, reply: Reply) -> None:
        payload = b"" if self.command == "HEAD" else reply.body
        if reply.spoil != "none" and payload:
            self._send_spoilt(reply, payload)
            return
        if reply.cut_after is not None:
            self.close_connection = True
            if not payload:
                return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status not in (204, 304):
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(payload[: reply.cut_after])

    def _send_spoilt(self, reply: Reply, payload: bytes) -> None:
        """Answer with a body that is not as it should be."""
        middle, spoil = len(payload) // 2, reply.spoil
        length = len(payload) + {"long": 1, "short": -1}.get(spoil, 0)
        self.close_connection = spoil != "flip"
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if spoil == "flip":
            payload = payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
        self.wfile.write(payload[:middle])
        if spoil == "stall":
            self.server.service.stopping.wait(60)
        elif spoil == "slow":
            for at in range(middle, len(payload), len(payload) // 8 + 1):
                self.wfile.flush()
                self.server.service.stopping.wait(0.05)
                self.wfile.write(payload[at : at + len(payload) // 8 + 1])
        elif spoil != "cut":
            self.wfile.write(payload[middle:length])

    def log_message(self, format: str, *args: Any) -> None:
        """Keep standard error for the tests: `Service.requests` is the log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: "Service") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.service = service
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let a client hang up in silence, as servers do; keep what else went wrong."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            self.service.crashes.append(error)

    def disconnect(self) -> None:
        """Close the connections that clients keep alive, as a server that exits does."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Service(ABC):
    """A stand-in service: subclasses answer requests in `respond`."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.crashes: list[Exception] = []
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._server: _Server | None = None
        self.stopping = threading.Event()

    @abstractmethod
    def respond(self, request: Request, body: bytes) -> Reply:
        """Answer one request; called from many threads at once."""

    @property
    def url(self) -> str:
        """The service's address, `http://127.0.0.1:<port>`, without a final slash."""
        if self._server is None:
            raise RuntimeError("the service is not running")
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in order of arrival, those met by a fault included."""
        with self._lock:
            return list(self._requests)

    def requested(self, match: str) -> list[Request]:
        """The logged requests whose "METHOD path" contains `match`."""
        return [request for request in self.requests if match in str(request)]

    def handle(self, request: Request, body: bytes) -> Reply:
        """Log a request, apply the faults, and answer."""
        with self._lock:
            self._requests.append(request)
        fault = self.faults.take(str(request))
        if fault is not None and fault.cut_after is None and fault.spoil == "none":
            return Reply(fault.status, fault.body, fault.headers)
        reply = self.respond(request, body)
        if fault is None:
            return reply
        return replace(reply, cut_after=fault.cut_after, spoil=fault.spoil)

    def start(self) -> Self:
        """Listen on a free port of 127.0.0.1 that the operating system chooses."""
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening, drop every connection, and raise the stand-in's own errors.

        An error in `respond` closes the connection, which a client may take for an outage and
        retry: raised here, a mistake in the stand-in fails the test that met it.
        """
        if self._server is None:
            return
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.disconnect()
        self._server = None
        if self.crashes:
            raise ExceptionGroup(f"{type(self).__name__} crashed while answering", self.crashes)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()
