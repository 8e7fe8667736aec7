"""A language model without weights: its programs can be traced and compiled, not run.

Every array is a shape, a dtype and a sharding, so a model of any size takes no memory. It traces
what `LanguageModel` traces, for the platform of its mesh.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from job.model.language_model import LanguageModel, Preset
from job.model.load import load_task
from job.model.lora import LoraWeights, Weights
from job.model.patching import Patch, patched
from job.model.sharding import DATA_AXIS, LARGE_VARIABLE, weight_sharding
from job.spec.schema import Model


@dataclass(frozen=True)
class _Tokens:
    """The part of a tokenizer that programs read; the ids do not change a program's cost."""

    stop_ids: tuple[int, ...] = (1, 106)
    pad_id: int = 0


class AbstractModel(LanguageModel):
    """A `LanguageModel` whose arrays are shapes."""

    def __init__(self, task: Any, model: Model, mesh: Mesh) -> None:
        preset = Preset(model.preset, model.revision)
        super().__init__(task, _Tokens(), model, preset, mesh)  # type: ignore[arg-type]

    def _place(self, variables: Sequence[Any]) -> Weights:
        return tuple(
            abstract_array(v.shape, v.dtype, weight_sharding(v.shape, self.mesh)) for v in variables
        )

    def replicate(self, tree: Any) -> Any:
        """Return the shapes of replicated arrays."""
        return jax.tree.map(
            lambda array: abstract_array(array.shape, array.dtype, self.replicated), tree
        )

    def shard_batch(self, tree: Any, axis: int = 0) -> Any:
        """Return the shapes of arrays split over the data-parallel devices along `axis`."""
        sharding = self._sharding(*([None] * axis), DATA_AXIS)
        return jax.tree.map(lambda array: abstract_array(array.shape, array.dtype, sharding), tree)

    def process_local(self, value: int) -> jax.Array:
        """Return the shape of one number per device."""
        del value
        shape: jax.Array = abstract_array(
            self.mesh.devices.shape, jnp.int32, self._sharding(*self.mesh.axis_names)
        )
        return shape

    @property
    def hidden_size(self) -> int:
        """The width of a hidden state."""
        return int(self.backbone.token_embedding.embeddings.shape[1])

    @property
    def compute_dtype(self) -> Any:
        """The dtype of hidden states."""
        return jnp.dtype(self.backbone.compute_dtype)

    def abstract_lora(self) -> LoraWeights:
        """Return the shapes of a replicated adapter."""
        pairs = (self.lora.shapes(target) for target in self.lora.targets)
        return tuple(
            (
                abstract_array(a, jnp.float32, self.replicated),
                abstract_array(b, jnp.float32, self.replicated),
            )
            for a, b in pairs
        )


def abstract_array(shape: Sequence[int], dtype: Any, sharding: Sharding) -> Any:
    """Return an array without values, with its sharding."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)  # type: ignore[no-untyped-call]


def abstract_model(model: Model, config: Mapping[str, Any], mesh: Mesh) -> AbstractModel:
    """Make the model of a preset's configuration (its config.json, KerasHub's or transformers').

    Raises:
        UsageError: KerasHub does not know the model, or the spec does not fit it.
    """
    return AbstractModel(make_task(model, config), model, mesh)


def make_task(model: Model, config: Mapping[str, Any], rank: int | None = None) -> Any:
    """Make the KerasHub task of a configuration, with no values in its large variables.

    Args:
        rank: of KerasHub's own LoRA; no LoRA if unset.

    Raises:
        UsageError: KerasHub does not know the model.
    """
    with tempfile.TemporaryDirectory(prefix="job-plan-") as folder, _without_values():
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        task = load_task(folder, model.dtype, model.preset, load_weights=False)
        if rank is not None:
            task.backbone.enable_lora(rank)
    return task


def _without_values() -> AbstractContextManager[None]:
    """Make Keras create large variables without a value.

    Where Keras reads one to infer shapes, it gets zeros that take no memory.
    """
    from keras.src.backend.jax.core import JaxVariable

    original = JaxVariable._initialize_with_initializer

    def initialize(variable: Any, initializer: Any) -> None:
        if math.prod(variable._shape) < LARGE_VARIABLE:  # small ones may be read while tracing
            original(variable, initializer)
            return
        variable._value = None
        variable._initializer = _zeros

    return patched([Patch(JaxVariable, "_initialize_with_initializer", initialize)])


def _zeros(shape: Sequence[int], dtype: Any = None) -> np.ndarray:
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), tuple(shape))
