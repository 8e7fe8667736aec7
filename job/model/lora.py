"""LoRA as a function: adapter parameters beside the frozen weights, merged when called.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": an adapted kernel is
`W + (alpha / rank) * A @ B`. The arithmetic is that of Keras' own LoRA layers (sum in
float32, cast to the compute type), so a saved adapter gives the same model in KerasHub;
but the model's layers are never changed, and one set of frozen weights serves the baseline,
training and the tuned model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from job.errors import UsageError
from job.spec.schema import Lora

Weights = tuple[jax.Array, ...]
"""The variables of a backbone, in its own order."""


LoraWeights = tuple[tuple[jax.Array, jax.Array], ...]
"""(A, B) of each target in order: `[..., rank]` and `[rank, last]`, float32."""


@dataclass(frozen=True)
class LoraTarget:
    """A layer that gets an adapter."""

    layer_index: int
    """Its place among the backbone's layers with weights: how KerasHub's files name it."""
    path: str
    weight_index: int
    """The place of its kernel in the backbone's variables."""
    kernel_shape: tuple[int, ...]
    equations: tuple[str, str] | None = None
    """The einsums of A and B beside the kernel; None where only merging will do."""


@dataclass(frozen=True)
class LoraLayout:
    """Which kernels of a backbone are adapted, and how."""

    rank: int
    alpha: float
    targets: tuple[LoraTarget, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of `A @ B`.

        alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (Kalajdzievski 2023).
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        shapes = (shape for target in self.targets for shape in self.shapes(target))
        return sum(int(np.prod(shape)) for shape in shapes)

    def shapes(self, target: LoraTarget) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of a target, Keras' way: the last axis is factored."""
        *front, last = target.kernel_shape
        return (*front, self.rank), (self.rank, last)

    def start(self, seed: int) -> LoraWeights:
        """The weights training starts from: A as Keras starts it (he_uniform), B zero."""
        pairs = []
        for number, target in enumerate(self.targets):
            a_shape, b_shape = self.shapes(target)
            start = keras.initializers.HeUniform(seed=seed * 100_003 + number)
            a = jnp.asarray(start(a_shape, dtype="float32"))
            pairs.append((a, jnp.zeros(b_shape, jnp.float32)))
        return tuple(pairs)

    def scaled(self, lora: LoraWeights) -> LoraWeights:
        """The adapter with the factor of `A @ B` multiplied into B."""
        return tuple((a, self.scale * b) for a, b in lora)

    def inside(self) -> "LoraLayout":
        """The part of the layout that can only be merged into the kernels."""
        return replace(self, targets=tuple(t for t in self.targets if t.equations is None))

    def merge(self, weights: Weights, lora: LoraWeights) -> Weights:
        """The backbone's variables with the adapter added to the kernels it adapts."""
        merged = list(weights)
        for target, (a, b) in zip(self.targets, lora, strict=True):
            kernel = merged[target.weight_index]
            update = self.scale * jnp.matmul(a, b)
            merged[target.weight_index] = (kernel + update).astype(kernel.dtype)
        return tuple(merged)


def weighted_layers(backbone: Any) -> list[Any]:
    """The layers that KerasHub numbers in its LoRA files."""
    return [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]


def make_lora_layout(backbone: Any, lora: Lora) -> LoraLayout:
    """The layout for the layers that the spec names.

    Raises:
        UsageError: a name matches no layer with a kernel that can be adapted.
    """
    index_of = {id(variable): i for i, variable in enumerate(backbone.variables)}
    adaptable = [
        (index, layer)
        for index, layer in enumerate(weighted_layers(backbone))
        if hasattr(layer, "enable_lora") and getattr(layer, "_kernel", None) is not None
    ]
    targets = [
        LoraTarget(
            index,
            layer.path,
            index_of[id(layer._kernel)],
            tuple(int(size) for size in layer._kernel.shape),
            _equations(layer),
        )
        for index, layer in adaptable
        if lora.targets == "all-linear" or layer.name in lora.targets
    ]
    names = sorted({layer.name for _, layer in adaptable})
    for wanted in () if lora.targets == "all-linear" else lora.targets:
        if wanted not in names:
            raise UsageError(
                f"model.lora.targets: no layer is named '{wanted}'; "
                f"this model has {', '.join(names)}"
            )
    alpha = float(lora.rank if lora.alpha is None else lora.alpha)
    return LoraLayout(lora.rank, alpha, tuple(targets), lora.rslora)


def _equations(layer: Any) -> tuple[str, str] | None:
    """Einsums that give `x @ A @ B` for a layer whose kernel is factored on its last axis."""
    if keras.activations.serialize(layer.activation) != "linear":
        return None
    if isinstance(layer, keras.layers.Dense):
        return "...i,ir->...r", "...r,ro->...o"
    if not isinstance(layer, keras.layers.EinsumDense) or "." in layer.equation:
        return None
    inputs, _, rest = layer.equation.partition(",")
    kernel, _, output = rest.partition("->")
    last = kernel[-1]
    rank = next(letter for letter in "rzyxwvu" if letter not in layer.equation)
    if last in inputs or last not in output:
        return None
    inner = output.replace(last, rank)
    return f"{inputs},{kernel[:-1]}{rank}->{inner}", f"{inner},{rank}{last}->{output}"


def flatten_lora(lora: LoraWeights) -> list[jax.Array]:
    """A and B of each target in one list: A0, B0, A1, B1, ..."""
    return [array for pair in lora for array in pair]


def unflatten_lora(arrays: Sequence[Any]) -> LoraWeights:
    """The inverse of `flatten_lora`."""
    return tuple(zip(arrays[::2], arrays[1::2], strict=True))
