"""Shard frozen weights over the mesh's `model` axis, loading each one directly into its shards.

The rule needs no table of model families. A vector is replicated. A kernel with three axes is
split by heads (its shortest axis) if divisible. Otherwise, and for any other kernel, the longest
divisible axis is split. XLA inserts the communication.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from job.errors import UsageError
from job.model.patching import Patch, patched
from job.runtime import logs

DATA_AXIS = "data"
MODEL_AXIS = "model"
LARGE_VARIABLE = 1 << 16
"""Variables with at least this many elements get no initial value of their own."""

_NEGLIGIBLE = 0.01
"""Maximum share of parameters in kernels that cannot be split."""


def shard_axis(shape: Sequence[int], parts: int) -> int | None:
    """Return the axis along which a weight is split into `parts`, or None if it is replicated."""
    if parts == 1 or len(shape) < 2:
        return None
    dividing = [axis for axis, size in enumerate(shape) if size >= parts and size % parts == 0]
    if not dividing:
        return None
    heads = min(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) == 3 and heads in dividing:
        return heads
    return max(dividing, key=lambda axis: shape[axis])


def weight_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the sharding of a weight of this shape."""
    axis = shard_axis(shape, mesh.shape[MODEL_AXIS])
    names = [None] * len(shape) if axis is None else [None] * axis + [MODEL_AXIS]
    return NamedSharding(mesh, jax.P(*names))  # type: ignore[no-untyped-call]


def device_put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Put a host array on devices; each process copies only its own part.

    Unlike `jax.device_put` it works if some devices belong to other processes. An array that is
    on devices already is moved as JAX sees fit.
    """
    if isinstance(array, jax.Array) or sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def loading_to_shards(mesh: Mesh) -> AbstractContextManager[None]:
    """Make Keras create new variables on their shards, and load into them.

    A value read from a file stays on the host until it is split: no device ever holds all of a
    weight that is split.
    """
    return creating_variables(lambda value: device_put(value, weight_sharding(value.shape, mesh)))


def creating_variables(put: Callable[[Any], Any]) -> AbstractContextManager[None]:
    """Make Keras give new variables what `put` makes of values on the host.

    Large ones start as zeros that take no memory, since loading overwrites them.
    """
    from keras.src.backend.jax.core import JaxVariable

    def convert(_variable: Any, value: Any, dtype: Any = None) -> Any:
        if isinstance(value, jax.Array):
            return value if dtype is None else value.astype(dtype)
        return np.asarray(value, None if dtype is None else jax.numpy.dtype(dtype))

    def initialize(variable: Any, initializer: Callable[..., Any]) -> None:
        shape, dtype = variable._shape, jax.numpy.dtype(variable._dtype)
        if math.prod(shape) >= LARGE_VARIABLE:
            value = np.broadcast_to(np.zeros((), dtype), shape)
        else:
            value = np.asarray(initializer(shape, dtype=variable._dtype))
        assign(variable, value)

    def assign(variable: Any, value: Any) -> None:
        variable._value = put(value)

    return patched([
        Patch(JaxVariable, "_convert_to_tensor", convert),
        Patch(JaxVariable, "_initialize_with_initializer", initialize),
        Patch(JaxVariable, "_direct_assign", assign),
    ])  # fmt: skip


def check_shardable(variables: Sequence[Any], mesh: Mesh) -> None:
    """Log which share of the frozen weights each device holds.

    Raises:
        UsageError: too many parameters cannot be split over the `model` axis.
    """
    parts = mesh.shape[MODEL_AXIS]
    if parts == 1:
        return
    replicated = [v for v in variables if shard_axis(v.shape, parts) is None]
    kernels = [v for v in replicated if len(v.shape) > 1]
    total, in_full, unsplit = (
        sum(math.prod(v.shape) for v in group) for group in (variables, replicated, kernels)
    )
    if unsplit > _NEGLIGIBLE * total:
        largest = max(kernels, key=lambda v: math.prod(v.shape))
        raise UsageError(
            f"runtime.mesh.model: no axis of {largest.path} {tuple(largest.shape)} is divisible "
            f"by {parts}; use a smaller power of two"
        )
    logs.get().info(
        "frozen weights sharded",
        devices=parts,
        sharded=len(variables) - len(replicated),
        replicated=len(replicated),
        share_per_device=round((in_full + (total - in_full) / parts) / total, 4),
    )
