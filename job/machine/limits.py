"""Limits of a device: its memory, the share an estimate may fill, chunk sizes, batches that fit.

Training and `job plan` share these numbers; importing them does not import JAX.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

USABLE_SHARE = 0.9
"""Share of a device's memory that an estimate may fill."""

LOGITS_SLICE_BYTES = 2**30
"""Bytes of logits that a device computes at a time."""

ATTENTION_CHUNK = 128
"""Queries that share a slice of keys in local attention on an accelerator."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory(device: "jax.Device") -> int:
    """Return the bytes of a device's memory; for a CPU device, its share of this process's."""
    import jax

    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text().strip()).isdigit():
        host = min(host, int(text))
    return host // jax.local_device_count()


def divisors(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def largest_divisor(number: int, fits: Callable[[int], bool]) -> int:
    """Return the largest divisor of `number` that fits; 1 if none does."""
    return next((n for n in divisors(number) if fits(n)), 1)


class DeviceMemoryError(Exception):
    """A micro-batch does not fit into a device's memory."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn JAX's out-of-memory errors into `DeviceMemoryError`.

    Raises:
        DeviceMemoryError: the device's memory ran out.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DeviceMemoryError from error
        raise
