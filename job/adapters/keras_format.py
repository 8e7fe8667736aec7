"""Adapters in KerasHub's format, which `backbone.load_lora_weights` reads.

The format stores a rank but no alpha, and KerasHub takes alpha = rank. So the factor alpha / rank
is multiplied into B when an adapter is saved, and the file means the same model to every reader;
loaded here, it has alpha = rank too. The format names layers by number only, so `adapter.json`
next to it describes the model and the layers.

Importing this module imports neither JAX nor Keras: commands read descriptions before they choose
a platform.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import h5py
import numpy as np
from pydantic import BaseModel, ValidationError

from job.errors import StageError, UsageError

if TYPE_CHECKING:
    from job.model.lora import LoraLayout, LoraWeights

H5 = "adapter.lora.h5"
CHAT_TEMPLATE = "chat_template.jinja"
"""The chat template that the adapter was trained with."""

DESCRIPTION = "adapter.json"


class AdapterLayer(BaseModel):
    """An adapted layer."""

    index: int
    """Its number in the h5 file."""
    path: str
    kernel: list[int]
    """The shape of its kernel."""


class AdapterInfo(BaseModel):
    """`adapter.json`: the description of `adapter.lora.h5`."""

    format: Literal[1] = 1
    preset: str
    """The base model, as the spec names it."""
    revision: str | None
    """The base model's commit, if it is from the Hub."""
    family: str
    """Class name of the KerasHub backbone."""
    rank: int
    alpha: float
    """Alpha used in training; the h5 file has it folded into B, so its alpha equals its rank."""
    rslora: bool
    targets: list[str]
    """Layer names, for `backbone.enable_lora(rank, targets)` before loading."""
    layers: list[AdapterLayer]
    files: dict[str, str]
    """SHA-256 of the adapter's files, by path relative to this one."""


def read_info(path: Path, source: str | None = None) -> AdapterInfo:
    """Read a description; messages name `source`, by default the path.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        return AdapterInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StageError(f"cannot read {source or path}: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise StageError(
            f"{source or path} is not the description of an adapter: {place}: {problem['msg']}"
        ) from error


def check_model(info: AdapterInfo, preset: str, family: str, where: str) -> None:
    """Raise UsageError if the adapter's base model differs; folders are compared by name."""
    if info.family != family or _base_name(info.preset) != _base_name(preset):
        raise UsageError(
            f"{where}: the adapter was trained on {info.preset} ({info.family}), but the model is "
            f"{preset} ({family}); use the adapter's model, or an adapter of this one"
        )


def _base_name(preset: str) -> str:
    return preset if "://" in preset else Path(preset).name


def describe(
    layout: "LoraLayout", family: str, preset: str, revision: str | None, files: Mapping[str, str]
) -> AdapterInfo:
    """Describe an adapter; arguments as in `AdapterInfo`."""
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


def save_adapter(path: Path, layout: "LoraLayout", lora: "LoraWeights") -> None:
    """Write an adapter; the same weights give the same bytes."""
    with h5py.File(path, "w") as file:
        group = file.create_group("lora")
        variables = group.create_group("vars")
        variables["rank"] = layout.rank
        for target, (a, b) in zip(layout.targets, lora, strict=True):
            inner = group.create_group(f"{target.layer_index}/vars")
            inner["lora_kernel_a"] = np.asarray(a, np.float32)
            inner["lora_kernel_b"] = np.asarray(b, np.float32) * np.float32(layout.scale)


def load_adapter(path: Path, layout: "LoraLayout") -> "tuple[LoraLayout, LoraWeights]":
    """Load an adapter with the rank and the targets of a layout.

    Returns:
        The layout that fits the file's weights (alpha = rank), and the weights.

    Raises:
        StageError: the file is not a LoRA file, or has another rank or other layers.
    """
    import jax.numpy as jnp

    kernels = {target.layer_index: target.kernel_shape for target in layout.targets}
    pairs = load_layers(path, layout.rank, kernels).values()
    lora = tuple((jnp.asarray(a), jnp.asarray(b)) for a, b in pairs)
    return replace(layout, alpha=float(layout.rank), rslora=False), lora


def load_layers(
    path: Path, rank: int, kernels: Mapping[int, Sequence[int]]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Load A and B of layers with these kernel shapes, by number; B includes the factor.

    Raises:
        StageError: the file is not a LoRA file, or has another rank or other layers.
    """
    layers = {}
    try:
        with h5py.File(path, "r") as file:
            if (stored := int(_array(file, "lora/vars/rank", ()))) != rank:
                raise StageError(f"{path.name} has rank {stored}, but model.lora.rank is {rank}")
            for index, (*front, last) in kernels.items():
                layers[index] = (
                    _array(file, f"lora/{index}/vars/lora_kernel_a", (*front, rank)),
                    _array(file, f"lora/{index}/vars/lora_kernel_b", (rank, last)),
                )
    except (OSError, KeyError, RuntimeError) as error:
        raise StageError(f"{path.name} is not a LoRA file of this model: {error}") from error
    return layers


def _array(file: h5py.File, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of numbers that the file itself holds.

    HDF5 files may refer to other files and claim arrays that they do not hold.
    """
    item = file
    for part in name.split("/"):
        is_group = isinstance(item, h5py.Group)
        if not is_group or not isinstance(item.get(part, getlink=True), h5py.HardLink):
            raise KeyError(f"it does not hold {name}")
        item = item[part]
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiu":
        raise KeyError(f"{name} is not an array of numbers")
    if item.shape != shape:
        raise StageError(
            f"{Path(file.filename).name}: {name} has shape {item.shape}, the model needs {shape}"
        )
    if item.is_virtual or item.external or item.id.get_storage_size() != item.nbytes:
        raise StageError(f"{Path(file.filename).name}: {name} is not stored in the file itself")
    array: np.ndarray = item[()]
    return array
