"""Adapters on file, in KerasHub's own format: `backbone.load_lora_weights` reads them.

The format has a rank but no alpha, and KerasHub then takes alpha = rank. The factor
alpha / rank is therefore multiplied into B on writing, so that the file means the same
model to every reader; read back here, it has alpha = rank too. It names layers by number
only, so a description goes beside it: whose adapter it is, and of which layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import h5py
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, ValidationError

from job.errors import StageError, UsageError
from job.model.lora import LoraLayout, LoraWeights

H5 = "adapter.lora.h5"


DESCRIPTION = "adapter.json"


class AdapterLayer(BaseModel):
    """An adapted layer."""

    index: int
    """Its number in the h5 file."""
    path: str
    kernel: list[int]
    """Shape of its kernel."""


class AdapterInfo(BaseModel):
    """`adapter.json`: what `adapter.lora.h5` is an adapter of."""

    format: Literal[1] = 1
    preset: str
    """The model, as the spec names it."""
    revision: str | None
    """Its commit, where it is of the Hub."""
    family: str
    """Class of the KerasHub backbone."""
    rank: int
    alpha: float
    """As trained. In the h5 file the factor is multiplied into B: there alpha is the rank."""
    rslora: bool
    targets: list[str]
    """Names of the layers, for `backbone.enable_lora(rank, targets)` before loading."""
    layers: list[AdapterLayer]
    files: dict[str, str]
    """SHA-256 of the adapter's files, by their paths beside this one."""


def read_info(path: Path) -> AdapterInfo:
    """Read a description.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        return AdapterInfo.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StageError(f"{path} is not the description of an adapter: {error}") from error


def check_model(info: AdapterInfo, preset: str, family: str, where: str) -> None:
    """Raise UsageError unless the adapter is of this model; folders are compared by name."""
    if info.family != family or _base_name(info.preset) != _base_name(preset):
        raise UsageError(
            f"{where}: the adapter is of {info.preset} ({info.family}), and the model is "
            f"{preset} ({family}); use the adapter's model, or an adapter of this one"
        )


def _base_name(preset: str) -> str:
    return preset if "://" in preset else Path(preset).name


def describe(
    layout: LoraLayout, family: str, preset: str, revision: str | None, files: Mapping[str, str]
) -> AdapterInfo:
    """The description of an adapter."""
    return AdapterInfo(
        preset=preset,
        revision=revision,
        family=family,
        rank=layout.rank,
        alpha=layout.alpha,
        rslora=layout.rslora,
        targets=sorted({target.path.rpartition("/")[2] for target in layout.targets}),
        layers=[
            AdapterLayer(index=t.layer_index, path=t.path, kernel=list(t.kernel_shape))
            for t in layout.targets
        ],
        files=dict(files),
    )


def save_adapter(path: Path, layout: LoraLayout, lora: LoraWeights) -> None:
    """Write an adapter; the same weights give the same bytes."""
    with h5py.File(path, "w") as file:
        group = file.create_group("lora")
        variables = group.create_group("vars")
        variables["rank"] = layout.rank
        for target, (a, b) in zip(layout.targets, lora, strict=True):
            inner = group.create_group(f"{target.layer_index}/vars")
            inner["lora_kernel_a"] = np.asarray(a, np.float32)
            inner["lora_kernel_b"] = np.asarray(b, np.float32) * np.float32(layout.scale)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError) as error:
        raise StageError(f"{path.name} is not a LoRA file of this model: {error}") from error


def _pair(file: h5py.File, index: int) -> tuple[np.ndarray, np.ndarray]:
    inner = file[f"lora/{index}/vars"]
    return inner["lora_kernel_a"][()], inner["lora_kernel_b"][()]


def load_adapter(path: Path, layout: LoraLayout) -> tuple[LoraLayout, LoraWeights]:
    """Read an adapter for the same targets.

    Returns:
        The layout that the file's weights belong to (alpha = rank), and the weights.

    Raises:
        StageError: the file is not a LoRA file, or is of another rank or of other layers.
    """
    with _opened(path) as file:
        rank = int(file["lora/vars/rank"][()])
        if rank != layout.rank:
            raise StageError(f"{path.name} is of rank {rank}, and the spec says {layout.rank}")
        pairs = []
        for target in layout.targets:
            a, b = _pair(file, target.layer_index)
            _check_shapes(path, target.path, a, b, layout.shapes(target))
            pairs.append((jnp.asarray(a), jnp.asarray(b)))
    return replace(layout, alpha=float(rank), rslora=False), tuple(pairs)


def load_layers(path: Path, info: AdapterInfo) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """A and B of the layers of a description, by their numbers; B has the factor in it.

    Raises:
        StageError: the file is not the one that was described.
    """
    found = {}
    with _opened(path) as file:
        for layer in info.layers:
            a, b = _pair(file, layer.index)
            *front, last = layer.kernel
            _check_shapes(path, layer.path, a, b, ((*front, info.rank), (info.rank, last)))
            found[layer.index] = a, b
    return found


def _check_shapes(
    path: Path, layer: str, a: np.ndarray, b: np.ndarray, wanted: tuple[object, object]
) -> None:
    if (a.shape, b.shape) != wanted:
        raise StageError(
            f"{path.name}: the adapter of {layer} has shapes {a.shape} and {b.shape}, "
            f"the model needs {wanted}"
        )
