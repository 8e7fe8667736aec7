"""A language model without weights: its programs can be traced and compiled, not run.

Every array is a shape, a dtype and a sharding, so a model of any size takes no memory. It traces
what any other `LanguageModel` traces, for the platform of its mesh.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from job.model.language_model import LanguageModel, Preset
from job.model.load import load_task
from job.model.sharding import LARGE_VARIABLE, creating_variables
from job.spec.schema import Model

_TOKENS: Any = SimpleNamespace(stop_ids=(1, 106), pad_id=0)
"""The part of a tokenizer that programs read; the ids do not change a program's cost."""


def abstract_array(array: Any, sharding: Sharding) -> Any:
    """Return an array without values, with another's shape and dtype."""
    dtype = jnp.dtype(array.dtype)
    return jax.ShapeDtypeStruct(tuple(array.shape), dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def abstract_model(model: Model, config: Mapping[str, Any], mesh: Mesh) -> LanguageModel:
    """Make the model of a preset's configuration (its config.json, KerasHub's or transformers').

    Raises:
        UsageError: KerasHub does not know the model, or the spec does not fit it.
    """
    preset = Preset(model.preset, model.revision)
    return LanguageModel(make_task(model, config), _TOKENS, model, preset, mesh, abstract_array)


def make_task(model: Model, config: Mapping[str, Any]) -> Any:
    """Make the KerasHub task of a configuration, with no values in its large variables.

    Raises:
        UsageError: KerasHub does not know the model.
    """
    with tempfile.TemporaryDirectory(prefix="job-plan-") as folder, creating_variables(_keep):
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_task(folder, model.dtype, model.preset, load_weights=False)


def _keep(value: np.ndarray) -> Any:
    """Return a variable's value as it is; small ones may be read while tracing."""
    return value if value.size >= LARGE_VARIABLE else jnp.asarray(value)
