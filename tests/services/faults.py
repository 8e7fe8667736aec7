"""Faults that a test injects into a stand-in service, from outside and by request.

A fault either replaces the answer (a status, headers, a body), or lets the service do its work
and then spoils the answer: the connection is cut or stalls in the middle of the body, the body
comes slowly, its length is not what the header says, or one byte of it is flipped. Left out:
connections refused before they open (stop the service for that).
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Spoil = Literal["none", "cut", "stall", "slow", "long", "short", "flip"]


@dataclass
class Fault:
    """What happens to `times` requests whose "METHOD path" contains `match`, after `skip`."""

    match: str
    status: int
    times: int
    headers: Mapping[str, str]
    body: bytes
    cut_after: int | None
    spoil: Spoil
    skip: int


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
        spoil: Spoil = "none",
        skip: int = 0,
    ) -> None:
        """Queue a fault for requests whose "METHOD path" contains `match`.

        Without `cut_after` and `spoil` the request never reaches the service: it is answered
        with `status`, `headers` and `body`. With `cut_after` the service does its work and
        answers as usual, but the connection closes after that many bytes of the body, or before
        the status line where the reply has no body: the client cannot know that its request was
        carried out. `spoil` does the same to the middle of a body, whatever its length: `cut`;
        `stall` (the rest never comes, the connection stays open); `slow` (the rest comes in
        pieces); `long` and `short` (the header says one byte more, or one less, than there is);
        `flip` (one byte has one bit changed).
        """
        fault = Fault(match, status, times, headers or {}, body, cut_after, spoil, skip)
        with self._lock:
            self._pending.append(fault)

    @property
    def pending(self) -> list[Fault]:
        """The faults not yet used up: empty once a client has met them all."""
        with self._lock:
            return list(self._pending)

    def clear(self) -> None:
        """Forget the faults still to come."""
        with self._lock:
            self._pending.clear()

    def take(self, line: str) -> Fault | None:
        """Use up one turn of the first fault that matches a request's "METHOD path"."""
        with self._lock:
            for fault in self._pending:
                if fault.match in line:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    if fault.times <= 0:
                        self._pending.remove(fault)
                    return fault
        return None
