"""Where each weight of a backbone is in a transformers checkpoint, and how it lies there.

No table says so here. KerasHub's converter of the family, the very code that loads such a
checkpoint, is run with a loader that only takes notes: which variable is made of which tensor,
by which function. The layout follows from the layer's einsum and is then tried on that function,
so a family that stacks or permutes its weights is refused rather than exported wrongly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from job.adapters.low_rank import Matrix
from job.errors import UsageError
from job.model.lora import LoraLayout, weighted_layers

Hook = Callable[[np.ndarray, list[int]], np.ndarray]


PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""What checkpoints put before a text model's names, the longest first."""


class Port(NamedTuple):
    """A tensor of a checkpoint that a variable is made of."""

    variable: Any
    name: str
    """The tensor's name in a transformers causal LM."""
    hook: Hook | None
    """Makes the variable's value of the tensor."""


class _Notes:
    """Stands in for KerasHub's loader of safetensors files."""

    preset = None

    def __init__(self) -> None:
        self.taken: list[tuple[Any, str, Hook | None]] = []

    def get_tensor(self, key: str) -> np.ndarray:
        raise KeyError(key)  # no file is looked into: converters go on with their default names

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        self.taken.append((keras_variable, hf_weight_key, hook_fn))


def checkpoint_ports(backbone: Any) -> list[Port]:
    """The tensors of the family's transformers checkpoint, as KerasHub's converter reads them.

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
    notes = _Notes()
    converters[0].convert_weights(backbone, notes, _config(backbone))
    text_only = not _sees_or_hears(backbone)
    full = _name_of_text_model if text_only else _name_beside_encoders
    return [Port(variable, full(name), hook) for variable, name, hook in notes.taken]


def _sees_or_hears(backbone: Any) -> bool:
    encoders = ("vision_encoder", "audio_encoder")
    return any(getattr(backbone, name, None) is not None for name in encoders)


def _config(backbone: Any) -> dict[str, Any]:
    """As much of the checkpoint's configuration as converters of weights look at."""
    family = type(backbone).__name__.removesuffix("Backbone").lower()
    if family == "gemma":
        return {"model_type": "gemma2" if backbone.use_post_ffw_norm else "gemma"}
    text_only = family in ("gemma3", "gemma4") and not _sees_or_hears(backbone)
    return {"model_type": f"{family}_text" if text_only else family}


def _name_of_text_model(name: str) -> str:
    """The name in the causal LM; some converters leave the prefix to the loader."""
    bare = bare_name(name)
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def _name_beside_encoders(name: str) -> str:
    """The name in a model that sees or hears too, whose checkpoints have older names."""
    return f"model.language_model.{bare_name(name)}" if "language_model." in name else name


def bare_name(name: str) -> str:
    """A tensor's or layer's name without what checkpoints put before it."""
    return next(name.removeprefix(p) for p in PREFIXES if name.startswith(p))


def linear_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes of a layer's kernel that make up the rows and the columns of its matrix `[out, in]`.

    None where the layer is no linear layer in that sense.
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


def target_matrices(backbone: Any, layout: LoraLayout) -> tuple[Matrix, ...]:
    """What each adapted kernel is in the transformers model.

    Raises:
        UsageError: some kernel has no counterpart there that an adapter could be of.
    """
    ports = {id(port.variable): port for port in checkpoint_ports(backbone)}
    layers = weighted_layers(backbone)
    tried: dict[object, bool] = {}
    matrices = []
    for target in layout.targets:
        layer = layers[target.layer_index]
        port, axes = ports.get(id(layer._kernel)), linear_axes(layer)
        if port is None or axes is None or not port.name.endswith(".weight"):
            raise UsageError(f"{target.path} has no layer of its own in the transformers model")
        matrix = Matrix(port.name.removesuffix(".weight"), target.kernel_shape, *axes)
        if len(target.kernel_shape) - 1 not in matrix.out_axes:
            raise UsageError(f"{target.path}: its adapter is not one of a linear layer")
        kind = (layer.name, target.kernel_shape)
        if kind not in tried:
            tried[kind] = port.hook is not None and _makes(port.hook, matrix)
        if not tried[kind]:
            raise UsageError(
                f"{target.path} does not lie in the transformers model as its equation says"
            )
        matrices.append(matrix)
    names = [matrix.module for matrix in matrices]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"several adapted kernels are made of {', '.join(sorted(twice))}")
    return tuple(matrices)


def _makes(hook: Hook, matrix: Matrix) -> bool:
    """Whether a converter's hook makes the kernel of the matrix."""
    kernel = _probe(matrix.kernel_shape)
    return _same(hook, matrix.of_kernel(kernel), kernel)


def _probe(shape: Sequence[int]) -> np.ndarray:
    # Small whole numbers, which hooks that cast to 16 bits keep.
    numbers = np.random.default_rng(0).integers(-1000, 1000, tuple(shape))
    return numbers.astype(np.float32)


def _same(hook: Hook, tensor: np.ndarray, value: np.ndarray) -> bool:
    try:
        made = hook(tensor, list(value.shape))
    except (ValueError, IndexError):
        return False
    return made.shape == value.shape and bool(np.array_equal(made, value))


def inverted(port: Port, layer: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The function that makes a checkpoint's tensor of a variable's value.

    Args:
        layer: the layer that the variable is the kernel of, or None.

    Raises:
        UsageError: the tensor is not just the variable in another order.
    """
    if port.hook is None:
        return lambda value: value
    shape = tuple(int(size) for size in port.variable.shape)
    ways: list[Callable[[np.ndarray], np.ndarray]] = []
    axes = None if layer is None else linear_axes(layer)
    if axes is not None:
        ways.append(Matrix(port.name, shape, *axes).of_kernel)
    ways += [lambda value: value, np.transpose, lambda value: value.reshape(-1)]
    probe = _probe(shape)
    for way in ways:
        if _same(port.hook, way(probe), probe):
            return way
    raise UsageError(f"{port.name} cannot be made of {port.variable.path}")
