"""LoRA as a function: adapter weights are arguments, either merged into the kernels or run as
branches alongside them.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models": an adapted kernel is
`W + (alpha / rank) * A @ B`. Merging does the arithmetic of Keras' own LoRA layers (sum in
float32, cast to the compute dtype), so a saved adapter gives the same model in KerasHub. The
model's layers never change, and one set of frozen weights serves the baseline, training and the
tuned model.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import ops

from job.errors import UsageError
from job.model.patching import Patch, patched
from job.spec.schema import Lora

Weights = tuple[jax.Array, ...]
"""The variables of a backbone, in KerasHub's order."""

LoraWeights = tuple[tuple[jax.Array, jax.Array], ...]
"""(A, B) of each target in the layout's order: `[..., rank]` and `[rank, last]`, float32."""


@dataclass(frozen=True)
class LoraTarget:
    """An adapted layer."""

    layer_index: int
    """Index among the backbone's layers with weights, by which KerasHub's LoRA files name it."""
    path: str
    weight_index: int
    """Index of its kernel among the backbone's variables."""
    kernel_shape: tuple[int, ...]
    equations: tuple[str, str] | None = None
    """The einsums of A and B in a branch; None if the adapter can only be merged."""


@dataclass(frozen=True)
class LoraLayout:
    """The adapted kernels of a backbone, with rank and scaling."""

    rank: int
    alpha: float
    targets: tuple[LoraTarget, ...]
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of `A @ B`: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

        Rank-stabilized LoRA: Kalajdzievski 2023.
        """
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        shapes = (shape for target in self.targets for shape in self.shapes(target))
        return sum(int(np.prod(shape)) for shape in shapes)

    def shapes(self, target: LoraTarget) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B; like Keras, the kernel's last axis is factored."""
        *front, last = target.kernel_shape
        return (*front, self.rank), (self.rank, last)

    def init(self, seed: int) -> LoraWeights:
        """Return initial weights: A as Keras initializes it (he_uniform), B zero."""
        pairs = []
        for index, target in enumerate(self.targets):
            a_shape, b_shape = self.shapes(target)
            initializer = keras.initializers.HeUniform(seed=seed * 100_003 + index)
            a = jnp.asarray(initializer(a_shape, dtype="float32"))
            pairs.append((a, jnp.zeros(b_shape, jnp.float32)))
        return tuple(pairs)

    def merge(self, weights: Weights, lora: LoraWeights) -> Weights:
        """Return the backbone's variables with the adapter added to the kernels; traceable."""
        merged = list(weights)
        for target, (a, b) in zip(self.targets, lora, strict=True):
            kernel = merged[target.weight_index]
            update = self.scale * jnp.matmul(a, b)
            merged[target.weight_index] = (kernel + update).astype(kernel.dtype)
        return tuple(merged)


def weighted_layers(backbone: Any) -> list[Any]:
    """List the layers that KerasHub numbers in its LoRA files."""
    return [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]


def make_lora_layout(backbone: Any, lora: Lora) -> LoraLayout:
    """Lay out adapters for the layers that the spec names.

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
    for name in () if lora.targets == "all-linear" else lora.targets:
        if name not in names:
            raise UsageError(
                f"model.lora.targets: no layer is named '{name}'; this model has {', '.join(names)}"
            )
    alpha = float(lora.rank if lora.alpha is None else lora.alpha)
    return LoraLayout(lora.rank, alpha, tuple(targets), lora.rslora)


def _equations(layer: Any) -> tuple[str, str] | None:
    """Return the einsums that compute `x @ A @ B`, or None if the layer has no such form."""
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
    """List A and B of each target: A0, B0, A1, B1, ..."""
    return [array for pair in lora for array in pair]


def unflatten_lora(arrays: Sequence[Any]) -> LoraWeights:
    """Invert `flatten_lora`."""
    return tuple(zip(arrays[::2], arrays[1::2], strict=True))


class Dropout(NamedTuple):
    """Dropout on adapter inputs."""

    rate: float | jax.Array
    """Share of the inputs to drop."""
    key: jax.Array
    """JAX random key of the step."""
    layer_ids: jax.Array | None = None
    """int32 `[targets]`, folded into the key for each target; its `layer_index` if unset."""


def lora_branches(
    backbone: Any, layout: LoraLayout, lora: LoraWeights, dropout: Dropout | None
) -> AbstractContextManager[None]:
    """Make adapted layers add their adapter's output to their own.

    In a branch (`x @ W + scale * (x @ A) @ B`) rather than merged (`x @ (W + ...)`), the gradient
    of a frozen kernel is never formed, and a small update is not rounded away when the kernel is
    bfloat16. Targets that can only be merged are skipped.
    """
    layers = weighted_layers(backbone)
    patches = []
    for index, (target, (a, b)) in enumerate(zip(layout.targets, lora, strict=True)):
        if target.equations is not None:
            layer = layers[target.layer_index]
            ids = None if dropout is None else dropout.layer_ids
            drop = _dropper(dropout, target.layer_index if ids is None else ids[index])
            call = _with_branch(layer.call, target.equations, (a, layout.scale * b), drop)
            patches.append(Patch(layer, "call", call))
    return patched(patches)


def _dropper(dropout: Dropout | None, layer_id: int | jax.Array) -> Callable[[Any], Any]:
    """Return inverted dropout (Srivastava et al. 2014) with a key of the layer's own."""
    if dropout is None:
        return lambda x: x
    key, keep = jax.random.fold_in(dropout.key, layer_id), 1.0 - dropout.rate

    def drop(x: Any) -> Any:
        mask = jax.random.bernoulli(key, keep, x.shape)
        return ops.where(mask, x / ops.cast(keep, x.dtype), ops.zeros_like(x))

    return drop


def _with_branch(
    frozen: Callable[..., Any],
    equations: tuple[str, str],
    pair: tuple[Any, Any],
    drop: Callable[[Any], Any],
) -> Callable[..., Any]:
    a, b = pair

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        inner = ops.einsum(equations[0], drop(x), ops.cast(a, x.dtype))
        return frozen(x, *args, **kwargs) + ops.einsum(equations[1], inner, ops.cast(b, x.dtype))

    return call
