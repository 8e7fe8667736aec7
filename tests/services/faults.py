"""Faults that a test injects into a stand-in service, from outside and by request.

A fault either replaces the answer (a status, headers, a body) or lets the service do its work
and then cuts the connection. Left out: delays, and connections refused before they open (stop
the service for that).
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" contains `match`."""

    match: str
    status: int
    times: int
    headers: Mapping[str, str]
    body: bytes
    cut_after: int | None


class Faults:
    """The faults still to come, consumed in the order in which they were added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Fault] = []

    def add(
        self,
        match: str,
        status: int = 503,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        cut_after: int | None = None,
    ) -> None:
        """Queue a fault for requests whose "METHOD path" contains `match`.

        Without `cut_after` the request never reaches the service: it is answered with `status`,
        `headers` and `body`. With `cut_after` the service does its work and answers as usual,
        but the connection closes after that many bytes of the body, or before the status line
        where the reply has no body: the client cannot know that its request was carried out.
        """
        with self._lock:
            self._pending.append(Fault(match, status, times, headers or {}, body, cut_after))

    @property
    def pending(self) -> list[Fault]:
        """The faults not yet used up: empty once a client has met them all."""
        with self._lock:
            return list(self._pending)

    def take(self, line: str) -> Fault | None:
        """Use up one turn of the first fault that matches a request's "METHOD path"."""
        with self._lock:
            for fault in self._pending:
                if fault.match in line:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._pending.remove(fault)
                    return fault
        return None
