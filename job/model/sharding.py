"""Frozen weights over the `model` axis of the mesh, each loaded straight to its shards.

The rule knows no family of models. A vector is whole on every device. Of a kernel with three
axes the heads are split where they divide (they are its shortest axis); of any other kernel,
and where they do not, the longest axis that divides. The compiler moves what must be moved.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from job.errors import UsageError
from job.runtime import logs

MODEL = "model"


_LARGE = 1 << 16
"""Elements from which a new variable starts as zeros instead of random numbers."""


_NEGLIGIBLE = 0.01
"""Share of all parameters that kernels which cannot be split may have."""


def split_axis(shape: Sequence[int], parts: int) -> int | None:
    """The axis of a weight that is split into `parts`, or None where it stays whole."""
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
    """How a weight of this shape lies on the mesh."""
    axis = split_axis(shape, mesh.shape[MODEL])
    names = [None] * len(shape) if axis is None else [None] * axis + [MODEL]
    return NamedSharding(mesh, jax.P(*names))  # type: ignore[no-untyped-call]


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """A host array on the devices of a sharding; each process copies only its own part.

    An array that is on devices already is moved as JAX sees fit.
    """
    if isinstance(array, jax.Array) or sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


@contextlib.contextmanager
def loading_to(mesh: Mesh) -> Iterator[None]:
    """Within this block new Keras variables are made on their shards, and loaded into them.

    A value read from a file stays on the host until it is cut up: no device ever holds a
    split weight whole. Large variables start as zeros, since loading overwrites them.
    """
    from keras.src.backend.jax.core import JaxVariable

    def convert(_variable: Any, value: Any, dtype: Any = None) -> Any:
        if isinstance(value, jax.Array):
            return value if dtype is None else value.astype(dtype)
        return np.asarray(value, None if dtype is None else jax.numpy.dtype(dtype))

    def initialize(variable: Any, initializer: Callable[..., Any]) -> None:
        shape, dtype = variable._shape, jax.numpy.dtype(variable._dtype)
        if math.prod(shape) >= _LARGE:
            value = np.broadcast_to(np.zeros((), dtype), shape)
        else:
            value = np.asarray(initializer(shape, dtype=variable._dtype))
        assign(variable, value)

    def assign(variable: Any, value: Any) -> None:
        variable._value = put(value, weight_sharding(value.shape, mesh))

    replaced = {
        "_convert_to_tensor": convert,
        "_initialize_with_initializer": initialize,
        "_direct_assign": assign,
    }
    originals = {name: getattr(JaxVariable, name) for name in replaced}
    for name, function in replaced.items():
        setattr(JaxVariable, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(JaxVariable, name, function)


def check_split(variables: Sequence[Any], mesh: Mesh) -> None:
    """Say what a device holds of the frozen weights.

    Raises:
        UsageError: kernels that matter cannot be split over the `model` axis.
    """
    parts = mesh.shape[MODEL]
    if parts == 1:
        return
    whole = [v for v in variables if split_axis(v.shape, parts) is None]
    kernels = [v for v in whole if len(v.shape) > 1]
    total, kept, stuck = (_elements(group) for group in (variables, whole, kernels))
    if stuck > _NEGLIGIBLE * total:
        largest = max(kernels, key=lambda v: math.prod(v.shape))
        raise UsageError(
            f"runtime.mesh.model: no axis of {largest.path} {tuple(largest.shape)} divides by "
            f"{parts}; use a smaller power of two"
        )
    logs.get().info(
        "frozen weights are split",
        over=parts,
        split=len(variables) - len(whole),
        whole=len(whole),
        share_of_a_device=round((kept + (total - kept) / parts) / total, 4),
    )


def _elements(variables: Sequence[Any]) -> int:
    return sum(math.prod(v.shape) for v in variables)
