"""A language model without weights: its programs can be traced and compiled, not run.

Every array is a shape, a type and a sharding, so a model of any size takes no memory. What it
traces is what `LanguageModel` traces, for the platform of the mesh it is given.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from job.errors import UsageError
from job.model.language_model import LanguageModel, Preset
from job.model.load import task_class
from job.model.lora import LoraWeights, Weights
from job.model.sharding import weight_sharding
from job.spec.schema import Model

_LARGE = 1 << 16
"""Elements from which a new variable gets no value; small ones may be needed while tracing."""


@dataclass(frozen=True)
class _Tokens:
    """What programs need of a tokenizer: token numbers, which change nothing about their cost."""

    stop_ids: tuple[int, ...] = (1, 106)
    pad_id: int = 0


class AbstractModel(LanguageModel):
    """A `LanguageModel` whose arrays are shapes."""

    def __init__(self, task: Any, model: Model, mesh: Mesh) -> None:
        preset = Preset(model.preset, model.revision)
        super().__init__(task, _Tokens(), model, preset, mesh)  # type: ignore[arg-type]

    def _place(self, variables: Sequence[Any]) -> Weights:
        return tuple(
            array_shape(v.shape, v.dtype, weight_sharding(v.shape, self.mesh)) for v in variables
        )

    def replicate(self, tree: Any) -> Any:
        """The shapes of arrays, whole on every device."""
        return jax.tree.map(
            lambda array: array_shape(array.shape, array.dtype, self.replicated), tree
        )

    def shard_batch(self, tree: Any, axis: int = 0) -> Any:
        """The shapes of arrays whose axis `axis` is split over the data-parallel devices."""
        sharding = self._sharding(*([None] * axis), "data")
        return jax.tree.map(lambda array: array_shape(array.shape, array.dtype, sharding), tree)

    def on_each_device(self, value: int) -> jax.Array:
        """The shape of a number on each device."""
        del value
        shape: jax.Array = array_shape(
            self.mesh.devices.shape, jnp.int32, self._sharding(*self.mesh.axis_names)
        )
        return shape

    @property
    def hidden_size(self) -> int:
        """Numbers of a hidden state."""
        return int(self._backbone.token_embedding.embeddings.shape[1])

    @property
    def compute_dtype(self) -> Any:
        """The type of hidden states."""
        return jnp.dtype(self._backbone.compute_dtype)

    def adapter(self) -> LoraWeights:
        """The shapes of an adapter, whole on every device."""
        pairs = (self.lora.shapes(target) for target in self.lora.targets)
        return tuple(
            (
                array_shape(a, jnp.float32, self.replicated),
                array_shape(b, jnp.float32, self.replicated),
            )
            for a, b in pairs
        )


def array_shape(shape: Sequence[int], dtype: Any, sharding: Sharding) -> Any:
    """An array without values, as it lies on the devices of a sharding."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)  # type: ignore[no-untyped-call]


def abstract_model(model: Model, config: Mapping[str, Any], mesh: Mesh) -> AbstractModel:
    """The model of a preset's configuration (its config.json, KerasHub's or transformers').

    Raises:
        UsageError: KerasHub does not know such a model, or the spec does not fit it.
    """
    return AbstractModel(make_task(model, config), model, mesh)


def make_task(model: Model, config: Mapping[str, Any], rank: int | None = None) -> Any:
    """The KerasHub task of a configuration, its large variables without values.

    Args:
        rank: of KerasHub's own LoRA; unset, it has none.

    Raises:
        UsageError: KerasHub does not know such a model.
    """
    with tempfile.TemporaryDirectory(prefix="job-plan-") as folder, _without_values():
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            task = task_class(folder).from_preset(
                folder, load_weights=False, preprocessor=None, dtype=model.dtype
            )
        except (ValueError, KeyError, ImportError) as error:
            raise UsageError(
                f"model.preset: KerasHub cannot make the causal language model of "
                f"{model.preset!r}: {str(error).partition(' A preset must')[0]}"
            ) from error
        if rank is not None:
            task.backbone.enable_lora(rank)
    return task


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Within this block large Keras variables are made without a value.

    Where Keras asks for one to find out shapes, it gets zeros that take no memory.
    """
    from keras.src.backend.jax.core import JaxVariable

    ordinary = JaxVariable._initialize_with_initializer

    def initialize(variable: Any, initializer: Any) -> None:
        if math.prod(variable._shape) < _LARGE:
            ordinary(variable, initializer)
            return
        variable._value = None
        variable._initializer = _zeros

    JaxVariable._initialize_with_initializer = initialize
    try:
        yield
    finally:
        JaxVariable._initialize_with_initializer = ordinary


def _zeros(shape: Sequence[int], dtype: Any = None) -> np.ndarray:
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), tuple(shape))
