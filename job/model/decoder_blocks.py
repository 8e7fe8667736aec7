"""A model split into its decoder blocks: what runs before them, one function per kind of block,
and what runs after them.

Compiling the full model compiles every block. Here blocks of one kind share a compiled function,
and what distinguishes them is passed in: weights, adapter, wavelengths of rotary embeddings.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding

from job.model.attention import segment_attention
from job.model.families import family_of
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import (
    Dropout,
    LoraLayout,
    LoraWeights,
    Weights,
    lora_branches,
    weighted_layers,
)
from job.model.patching import Patch, output_patch, patched
from job.model.remat import kernel_layers
from job.model.rotary import (
    fast_rotary,
    has_linear_scaling,
    rotary_constants,
    rotary_layers,
    with_rotary_constants,
)
from job.model.sharding import DATA_AXIS, MODEL_AXIS, shard_axis


class BlockArrays(NamedTuple):
    """The arrays that belong to one block."""

    weights: Weights
    """In the order of the block's variables."""
    lora: LoraWeights
    """Adapters of the block's targets, in the layout's order."""
    rotary: jax.Array
    """Wavelength and scaling factor of its rotary embeddings, float32 `[embeddings, 2]`."""
    layer_ids: jax.Array
    """Layer indices of its targets, int32 `[targets]`, for dropout."""


class BlockContext(NamedTuple):
    """What every block of a micro-batch gets besides its input."""

    segment_ids: jax.Array
    """int32 `[batch, length]`, as for `LanguageModel.hidden_states`."""
    dropout: Dropout | None = None
    """Dropout of the adapters' inputs."""


@dataclass(frozen=True)
class _Block:
    """A decoder block of the backbone."""

    layer: Any
    variables: tuple[int, ...]
    """Indices of its variables among the backbone's."""
    targets: tuple[int, ...]
    """Indices of its targets in the LoRA layout."""
    layout: LoraLayout
    """The layout of these targets."""
    constants: tuple[jax.Array, jax.Array]
    """Its `rotary` and `layer_ids`, on the devices."""
    kind: int
    """Index of the block whose functions it shares."""


class BlockwiseModel:
    """A model's blocks as separate functions, all traceable; made by `split_into_blocks`.

    Blocks of one kind share their functions. A kind is named by the index of one of its blocks.
    """

    def __init__(
        self, model: LanguageModel, config: ForwardConfig, blocks: Sequence[_Block]
    ) -> None:
        self._model = model
        self._backbone = model.backbone
        self._config = config
        self._blocks = tuple(blocks)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each block."""
        return tuple(block.kind for block in self._blocks)

    def arrays(self, weights: Weights, lora: LoraWeights) -> list[BlockArrays]:
        """Distribute a model's weights and adapter over its blocks."""
        return [
            BlockArrays(
                tuple(weights[index] for index in block.variables),
                tuple(lora[target] for target in block.targets),
                *block.constants,
            )
            for block in self._blocks
        ]

    def join_lora(self, parts: Sequence[LoraWeights]) -> LoraWeights:
        """Join the adapters (or their gradients) of all blocks, in the layout's order."""
        pairs = {
            target: pair
            for block, part in zip(self._blocks, parts, strict=True)
            for target, pair in zip(block.targets, part, strict=True)
        }
        return tuple(pairs[target] for target in range(len(pairs)))

    def embed(self, weights: Weights, token_ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Compute the input of the first block, `[batch, length, hidden]`."""
        captured: list[jax.Array] = []

        def capture(x: jax.Array, *_: Any, **__: Any) -> jax.Array:
            captured.append(x)
            return x

        self._without_blocks(weights, self._model.inputs(token_ids, segment_ids), capture)
        return captured[0]

    def final_norm(self, weights: Weights, x: jax.Array) -> jax.Array:
        """Compute the last hidden states from the last block's output `[batch, length, hidden]`."""
        unused = jnp.zeros(x.shape[:2], jnp.int32)
        inputs = self._model.inputs(unused, unused)
        return self._without_blocks(weights, inputs, lambda *_, **__: x)

    def _without_blocks(
        self, weights: Weights, inputs: Mapping[str, jax.Array], first: Callable[..., Any]
    ) -> jax.Array:
        """Run the backbone with `first` for its first block and the identity for the others."""

        def identity(x: Any, *_: Any, **__: Any) -> Any:
            return x

        layers = [block.layer for block in self._blocks]
        patches = [
            Patch(layers[0], "call", first),
            *(Patch(layer, "call", identity) for layer in layers[1:]),
        ]
        with self._model.with_weights(weights), patched(patches):
            outputs: jax.Array = self._backbone(inputs)
        return outputs

    def forward(
        self, kind: int, arrays: BlockArrays, x: jax.Array, context: BlockContext
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Run one block, with input `x` `[batch, length, hidden]`.

        Returns:
            The input of the next block, and the residuals: outputs of kernels that `backward`
            would otherwise recompute.
        """
        results: dict[int, jax.Array] = {}

        def record(index: int, result: jax.Array) -> jax.Array:
            results[index] = result
            return result

        outputs = self._run(kind, arrays, x, context, record)
        save = self._config.remat == "matmuls"
        return outputs, tuple(results[n] for n in sorted(results)) if save else ()

    def backward(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        context: BlockContext,
        residuals: Sequence[jax.Array],
        total: LoraWeights,
        gradient: jax.Array,
    ) -> tuple[jax.Array, LoraWeights]:
        """Compute the gradient of a block's input, and its adapter's added to `total`.

        Args:
            residuals: from `forward`, as are the arguments before.
            total: gradients of the adapter so far.
            gradient: of the block's output, `[batch, length, hidden]`.
        """

        def run(x: jax.Array, lora: LoraWeights) -> jax.Array:
            def substitute(index: int, result: jax.Array) -> jax.Array:
                value: jax.Array = _substitute(result, residuals[index]) if residuals else result
                return value

            own = arrays._replace(lora=lora)
            return self._run(kind, own, x, context, substitute)

        _, pull = jax.vjp(run, x, arrays.lora)
        x_gradient, lora_gradient = pull(gradient)
        return x_gradient, jax.tree.map(jnp.add, total, lora_gradient)

    def _run(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        context: BlockContext,
        tap: Callable[[int, jax.Array], jax.Array],
    ) -> jax.Array:
        """Run a block with the output of each of its kernels passed through `tap`."""
        block, config = self._blocks[kind], self._config
        segment_ids, dropout = context
        if dropout is not None:
            dropout = dropout._replace(layer_ids=arrays.layer_ids)
        kernels = kernel_layers(block.layer)
        mask = next(
            name
            for name in inspect.signature(type(block.layer).call).parameters
            if name.endswith("padding_mask")
        )
        with (
            keras.StatelessScope(
                state_mapping=list(zip(block.layer.variables, arrays.weights, strict=True))
            ),
            fast_rotary(self._backbone),
            with_rotary_constants(block.layer, arrays.rotary),
            segment_attention(self._backbone) if config.packed else nullcontext(),
            self._model.chunked_attention(segment_ids, config.longest),
            lora_branches(self._backbone, block.layout, arrays.lora, dropout),
            patched([output_patch(k, partial(tap, n)) for n, k in enumerate(kernels)]),
        ):
            outputs: jax.Array = block.layer.call(x, **{mask: segment_ids})
        return outputs

    def residual_shardings(self, kind: int) -> tuple[NamedSharding, ...]:
        """Return the shardings of the residuals of `forward`: split as the kernels are."""
        if self._config.remat != "matmuls":
            return ()
        mesh = self._model.mesh
        return tuple(
            NamedSharding(mesh, jax.P(DATA_AXIS, *_output_axes(layer, mesh.shape[MODEL_AXIS])))  # type: ignore[no-untyped-call]
            for layer in kernel_layers(self._blocks[kind].layer)
        )


def split_into_blocks(model: LanguageModel, config: ForwardConfig) -> BlockwiseModel | None:
    """Split a model into its blocks, or return None if it cannot be split.

    It can if its family is known, all adapters are branches of kernels in blocks, and the backward
    pass saves the outputs of kernels or nothing.
    """
    backbone = model.backbone
    if family_of(backbone) is None or config.remat == "none":
        return None
    if any(target.equations is None for target in model.lora.targets):
        return None
    variable_index = {id(variable): index for index, variable in enumerate(backbone.variables)}
    numbered = weighted_layers(backbone)
    layers = list(backbone.transformer_layers)
    owner = {id(part): n for n, layer in enumerate(layers) for part in layer._flatten_layers()}
    owners = [owner[id(numbered[target.layer_index])] for target in model.lora.targets]
    blocks = []
    for index, (layer, kind) in enumerate(zip(layers, _kinds(layers, config.longest), strict=True)):
        targets = tuple(target for target, block in enumerate(owners) if block == index)
        layout = replace(model.lora, targets=tuple(model.lora.targets[n] for n in targets))
        rotary = np.asarray(rotary_constants(layer), np.float32).reshape(-1, 2)
        layer_ids = np.asarray([target.layer_index for target in layout.targets], np.int32)
        variables = tuple(variable_index[id(variable)] for variable in layer.variables)
        constants = model.replicate((rotary, layer_ids))
        blocks.append(_Block(layer, variables, targets, layout, constants, kind))
    return BlockwiseModel(model, config, blocks)


def _kinds(layers: Sequence[Any], longest: int | None) -> list[int]:
    """Return, for each block, the index of one that differs only in its arrays."""
    signatures = [_signature(layer, longest) for layer in layers]
    # Prefer a block without a window as representative: its mask is cheaper.
    order = sorted(range(len(layers)), key=lambda index: _has_window(layers[index]))
    first = {signatures[index]: index for index in reversed(order)}
    return [first[signature] for signature in signatures]


def _signature(layer: Any, longest: int | None) -> tuple[Any, ...]:
    """Return what distinguishes the functions of two blocks of one family."""
    shapes = tuple(tuple(variable.shape) for variable in layer.variables)
    constants = rotary_constants(layer)
    if all(has_linear_scaling(part) for part in rotary_layers(layer)):
        constants = []
    window = layer.sliding_window_size if _has_window(layer) else None
    if window is not None and longest is not None and longest <= window:
        window = None
    return type(layer), shapes, tuple(constants), window


def _has_window(layer: Any) -> bool:
    return bool(getattr(layer, "use_sliding_window_attention", False))


@jax.custom_vjp
def _substitute(result: jax.Array, saved: jax.Array) -> jax.Array:
    """Return a saved result but differentiate `result`, which is then not computed."""
    del result
    return saved


def _substitute_forward(result: jax.Array, saved: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _substitute(result, saved), saved


def _substitute_backward(saved: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.zeros_like(saved)


_substitute.defvjp(_substitute_forward, _substitute_backward)


def _output_axes(layer: Any, parts: int) -> list[str | None]:
    """Return the sharding, after the batch axis, of a kernel's output if the kernel is split."""
    axis = shard_axis(layer._kernel.shape, parts)
    if axis is None:
        return []
    if isinstance(layer, keras.layers.Dense):
        return [None, MODEL_AXIS] if axis == 1 else []
    inputs, _, output = layer.equation.partition("->")
    index = output.find(inputs.partition(",")[2][axis])
    return [] if index < 0 else [None] * (index - 1) + [MODEL_AXIS]
