"""The lease of a folder: a small file that is taken, renewed and released by its one writer.

It is written only if it is unchanged since it was read (a generation precondition in a bucket, a
lock in a folder). It may be taken over once it has expired, or immediately if its owner was a
process of this machine that has ended. Its age is measured by the clock of the store, so that no
machine's own clock matters.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from job.errors import JobError, RunStoppedError
from job.runtime import logs
from job.storage.base import Store
from job.storage.retry import seconds_from

LEASE_KEY = "lease.json"
_SECONDS = 60.0


class LeaseRecord(BaseModel):
    """The owner of a lease, and how long it lasts unless it is renewed."""

    owner: str
    host: str
    process: str
    """Identity of the process on its machine; empty if unknown."""
    seconds: float = _SECONDS


class LeaseHeldError(RunStoppedError):
    """Another process has the lease."""


class Lease:
    """The lease of one folder, held by this process within a `with` block."""

    def __init__(self, store: Store, what: str, lost: Callable[[str], None]) -> None:
        """Prepare to hold a lease.

        Args:
            what: name for messages, such as "the run doctor-1".
            lost: called from another thread if the lease is lost.
        """
        self._store = store
        self._what = what
        self._lost = lost
        self._seconds = seconds_from("JOB_LEASE_SECONDS", _SECONDS)
        self._owner = uuid.uuid4().hex
        self._version = ""
        self._until = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.take()
        threading.Thread(target=self.renew, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def take(self) -> None:
        """Take the lease, or take it over.

        Raises:
            LeaseHeldError: another process has it.
        """
        current = self._store.read_version(LEASE_KEY)
        if current is not None:
            held = _parsed(current[0])
            if held and not _is_gone(held):
                self._check_expired(held)
            if held:
                logs.get().warning("taking over a lease", host=held.host)
        begun = time.monotonic()
        version = self._store.write_if_version(
            LEASE_KEY, self._content(), current[1] if current else None
        )
        if version is None:
            raise LeaseHeldError(
                f"another process just took the lease of {self._what}; run the same command again"
            )
        self._version, self._until = version, begun + self._seconds

    def _check_expired(self, held: LeaseRecord) -> None:
        """Check that a lease was not renewed in time; a file written now tells the store's time."""
        probe = f"{LEASE_KEY}.{self._owner}"
        try:
            self._store.write(probe, b"")
            now, lease = self._store.stat(probe), self._store.stat(LEASE_KEY)
        finally:
            self._store.delete(probe)
        if now is None or lease is None:
            raise LeaseHeldError(f"{self._what} was just released; run the same command again")
        age = now.modified - lease.modified
        if age <= held.seconds:
            raise LeaseHeldError(
                f"{self._what} is in use by another process ({held.host}), which renewed its "
                f"lease {max(age, 0):.0f} s ago; wait for it to end"
            )

    def _content(self) -> bytes:
        held = LeaseRecord(
            owner=self._owner,
            host=socket.gethostname(),
            process=_this_process(),
            seconds=self._seconds,
        )
        return held.model_dump_json().encode()

    def renew(self) -> None:
        """Renew the lease until it is released; meant for a thread of its own."""
        while not self._ended.wait(self._seconds / 3):
            begun = time.monotonic()
            try:
                version = self._store.write_if_version(LEASE_KEY, self._content(), self._version)
            except JobError as error:
                logs.get().warning("lease not renewed", reason=str(error))
                version = self._version
                begun = self._until - self._seconds
            if self._ended.is_set():
                return
            if version is None or time.monotonic() > self._until:
                self._until = 0.0
                self._lost("a lost lease")
                return
            self._version, self._until = version, begun + self._seconds

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            RunStoppedError: another process may have it by now.
        """
        if time.monotonic() > self._until:
            raise RunStoppedError(
                f"the lease of {self._what} was lost, or could not be renewed in time; "
                "run the same command to resume"
            )

    def release(self) -> None:
        """Release the lease; do nothing if it was lost."""
        self._ended.set()
        with contextlib.suppress(JobError):
            for _ in range(2):  # a concurrent renewal may have changed the version
                current = self._store.read_version(LEASE_KEY)
                held = current and _parsed(current[0])
                if not current or not held or held.owner != self._owner:
                    return
                if self._store.write_if_version(LEASE_KEY, None, current[1]) is not None:
                    return


def _parsed(content: bytes) -> LeaseRecord | None:
    try:
        return LeaseRecord.model_validate_json(content)
    except ValidationError:
        return None


def _start_of(pid: int) -> str | None:
    """Return the start of a process in ticks since boot, or None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Identify this boot of this machine and its process namespace; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _this_process() -> str:
    machine, start = _machine(), _start_of(os.getpid())
    return json.dumps([machine, os.getpid(), start]) if machine and start else ""


def _is_gone(held: LeaseRecord) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    try:
        machine, pid, start = json.loads(held.process)
    except ValueError:
        return False
    return bool(machine == _machine() and _start_of(int(pid)) != start)
