"""Map each backbone weight to its tensor and axis order in a transformers checkpoint.

There is no table of names here. KerasHub's converter of the family, the code that loads such a
checkpoint, is run with a loader that only records which variable comes from which tensor, and by
which function. The axis order follows from the layer's einsum and is then verified against that
function, so a family that stacks or permutes its weights is refused rather than exported wrongly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from job.adapters.low_rank import LinearMatrix
from job.errors import UsageError
from job.model.lora import LoraLayout, weighted_layers

Hook = Callable[[np.ndarray, list[int]], np.ndarray]
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""Prefixes of tensor names in text and multimodal checkpoints, longest first."""


class CheckpointTensor(NamedTuple):
    """A tensor of a transformers checkpoint, and the KerasHub variable computed from it."""

    variable: Any
    name: str
    """The tensor's name in a transformers causal LM."""
    hook: Hook | None
    """KerasHub's function from the tensor and the variable's shape to the variable's value."""


class _RecordingLoader:
    """A stand-in for KerasHub's loader of safetensors files that records what is loaded."""

    preset = None

    def __init__(self) -> None:
        self.loaded: list[CheckpointTensor] = []

    def get_tensor(self, key: str) -> np.ndarray:
        raise KeyError(key)  # no file is read: converters fall back to their default names

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        self.loaded.append(CheckpointTensor(keras_variable, hf_weight_key, hook_fn))


def checkpoint_tensors(backbone: Any) -> list[CheckpointTensor]:
    """List the tensors of the family's transformers checkpoint that KerasHub's converter loads.

    Raises:
        UsageError: KerasHub has no converter for this family.
    """
    from keras_hub.src.utils.transformers import preset_loader

    kind = type(backbone)
    converters = [
        module
        for name, module in vars(preset_loader).items()
        if name.startswith("convert_") and getattr(module, "backbone_cls", None) is kind
    ]
    if not converters:
        raise UsageError(
            f"KerasHub has no converter between transformers and {kind.__name__}: adapters of "
            "this family load in KerasHub only"
        )
    loader = _RecordingLoader()
    converters[0].convert_weights(backbone, loader, _config(backbone))
    multimodal = _is_multimodal(backbone)
    return [t._replace(name=_full_name(t.name, multimodal=multimodal)) for t in loader.loaded]


def _is_multimodal(backbone: Any) -> bool:
    encoders = ("vision_encoder", "audio_encoder")
    return any(getattr(backbone, name, None) is not None for name in encoders)


def _config(backbone: Any) -> dict[str, Any]:
    """Return what converters of weights read of the checkpoint's configuration."""
    family = type(backbone).__name__.removesuffix("Backbone").lower()
    if family == "gemma":
        return {"model_type": "gemma2" if backbone.use_post_ffw_norm else "gemma"}
    text_only = family in ("gemma3", "gemma4") and not _is_multimodal(backbone)
    return {"model_type": f"{family}_text" if text_only else family}


def _full_name(name: str, *, multimodal: bool) -> str:
    """Return the name in the causal LM; some converters leave the prefix to the loader."""
    bare = bare_name(name)
    if multimodal:  # its checkpoints have older names
        return f"model.language_model.{bare}" if "language_model." in name else name
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def bare_name(name: str) -> str:
    """Strip what checkpoints put before a tensor's or layer's name."""
    return next(name.removeprefix(p) for p in _PREFIXES if name.startswith(p))


def linear_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the axes of a kernel that make up the rows and the columns of a matrix `[out, in]`.

    None if the layer is not a linear layer in that sense.
    """
    if isinstance(layer, keras.layers.Dense):
        return (1,), (0,)
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    inputs, _, rest = layer.equation.partition(",")
    kernel, _, output = rest.partition("->")
    columns = tuple(kernel.index(letter) for letter in inputs if letter in kernel)
    rows = tuple(kernel.index(letter) for letter in output if letter in kernel)
    if set(rows) & set(columns) or len(rows) + len(columns) != len(kernel):
        return None
    return rows, columns


def target_matrices(backbone: Any, layout: LoraLayout) -> tuple[LinearMatrix, ...]:
    """Find the transformers matrix of each adapted kernel, in the layout's order.

    Raises:
        UsageError: a kernel has no counterpart there that a PEFT adapter could adapt.
    """
    tensors = {id(tensor.variable): tensor for tensor in checkpoint_tensors(backbone)}
    layers = weighted_layers(backbone)
    verified: dict[object, bool] = {}
    matrices = []
    for target in layout.targets:
        layer = layers[target.layer_index]
        tensor, axes = tensors.get(id(layer._kernel)), linear_axes(layer)
        if tensor is None or axes is None or not tensor.name.endswith(".weight"):
            raise UsageError(
                f"{target.path} has no matching layer in the transformers model (it may be fused)"
            )
        matrix = LinearMatrix(tensor.name.removesuffix(".weight"), target.kernel_shape, *axes)
        if len(target.kernel_shape) - 1 not in matrix.out_axes:
            raise UsageError(f"{target.path} cannot be written as the adapter of one linear layer")
        kind = (layer.name, target.kernel_shape)
        if kind not in verified:
            verified[kind] = tensor.hook is not None and _inverts(matrix, tensor)
        if not verified[kind]:
            raise UsageError(
                f"{target.path}: the axis order in transformers differs from the layer's einsum"
            )
        matrices.append(matrix)
    names = [matrix.module for matrix in matrices]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"several adapted kernels come from the same tensor: {', '.join(sorted(repeated))}"
        )
    return tuple(matrices)


def _inverts(matrix: LinearMatrix, tensor: CheckpointTensor) -> bool:
    """Tell whether a matrix's order of axes inverts the tensor's hook."""
    assert tensor.hook is not None
    # Small integers, which hooks that cast to 16 bits preserve.
    numbers = np.random.default_rng(0).integers(-1000, 1000, matrix.kernel_shape)
    kernel = numbers.astype(np.float32)
    try:
        converted = tensor.hook(matrix.from_kernel(kernel), list(kernel.shape))
    except (ValueError, IndexError):
        return False
    return np.array_equal(converted, kernel)
