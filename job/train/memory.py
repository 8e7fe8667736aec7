"""How many rows a device can hold at once: an estimate, before anything is compiled.

What a training step keeps for its backward pass is found by tracing it for one row, which
needs neither weights nor a device; the rest is small beside it.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from job.train.loss import SLICE_BYTES

_USABLE = 0.9
"""Share of a device's memory that is counted on."""
_WORKING = 1.25
"""What a backward pass holds at its fullest, over what it was given to keep."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory(device: jax.Device) -> int:
    """Bytes of memory of a device; of a CPU device its share of what this process may use."""
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(limit)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.is_file() and (said := _CGROUP_LIMIT.read_text().strip()).isdigit():
        host = min(host, int(said))
    return host // jax.local_device_count()


def kept_bytes(loss: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that reverse differentiation of `loss` by its first argument keeps.

    Arguments (arrays or their shapes) are not counted: they are there anyway.
    """

    def forward(*given: Any) -> Any:
        return jax.vjp(lambda first: loss(first, *given[1:]), given[0])[1]

    traced = jax.make_jaxpr(forward)(*arguments).jaxpr
    there = {id(variable) for variable in traced.invars}
    kept: dict[int, Any] = {
        id(v): v.aval for v in traced.outvars if hasattr(v, "aval") and id(v) not in there
    }
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values())


def held_bytes(arrays: Sequence[jax.Array]) -> int:
    """Bytes that one device holds of some arrays."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


def rows_that_fit(rows: int, row_bytes: int, held: int, memory: int) -> int:
    """The most of a device's `rows`, a divisor of them, that fit beside what it holds.

    Args:
        row_bytes: kept for the backward pass of a row.
        held: bytes of weights, adapter and optimizer.
        memory: bytes of the device.
    """
    free = _USABLE * memory - held - 2 * SLICE_BYTES
    return next((n for n in divisors(rows) if n * row_bytes * _WORKING <= free), 1)


def divisors(number: int) -> Sequence[int]:
    """All divisors, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]
