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

import h5py
import jax.numpy as jnp
import numpy as np

from job.errors import StageError
from job.model.adapter_info import AdapterInfo, AdapterLayer
from job.model.lora import LoraLayout, LoraWeights


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
