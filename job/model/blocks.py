"""A model block by block: what comes before its blocks, one function for all that are alike, and
what comes after.

A compiler that is given the whole model makes its blocks again and again. Given one block, of
whatever number, it makes one, and the blocks are run one after the other. What tells a block from
another is in its arguments: its weights, its adapter, the wavelengths of its rotary embeddings.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from keras_hub.layers import RotaryEmbedding

from job.model.attention import PACKABLE, segment_attention
from job.model.language_model import ForwardConfig, LanguageModel
from job.model.lora import LoraLayout, LoraWeights, Weights, weighted_layers
from job.model.patching import (
    Dropout,
    fast_rotary,
    kernel_layers,
    lora_branches,
    replaced_calls,
)
from job.model.sharding import MODEL, split_axis


class BlockArrays(NamedTuple):
    """What is a block's own."""

    weights: Weights
    """In the order of the block's variables."""
    lora: LoraWeights
    """Of its targets, in the order of the layout."""
    rotary: jax.Array
    """Wavelength and scaling of its rotary embeddings, float32 `[embeddings, 2]`."""
    numbers: jax.Array
    """Of its targets' layers, int32 `[targets]`, from which their dropout follows."""


@dataclass(frozen=True)
class _Block:
    """A block of the backbone."""

    layer: Any
    places: tuple[int, ...]
    """Of its variables among the backbone's."""
    targets: tuple[int, ...]
    """Of the layout's targets those that it has."""
    kind: int
    """The number of the block that stands for it."""


class Blocks:
    """The functions of a model's blocks; see `separate`."""

    def __init__(
        self, model: LanguageModel, settings: ForwardConfig, blocks: Sequence[_Block]
    ) -> None:
        self._model = model
        self._backbone = model.backbone
        self._settings = settings
        self._blocks = tuple(blocks)
        inside = {place for block in blocks for place in block.places}
        count = len(self._backbone.variables)
        self._outside = tuple(place for place in range(count) if place not in inside)
        self._constants = [self._constant(block) for block in blocks]

    @property
    def kinds(self) -> tuple[int, ...]:
        """Of each block, the number of the block whose functions are its own."""
        return tuple(block.kind for block in self._blocks)

    def outside(self, weights: Weights) -> Weights:
        """Of a model's weights those that are in no block."""
        return tuple(weights[place] for place in self._outside)

    def arrays(self, weights: Weights, lora: LoraWeights) -> list[BlockArrays]:
        """The arguments of each block."""
        return [
            BlockArrays(
                tuple(weights[place] for place in block.places),
                tuple(lora[target] for target in block.targets),
                *constants,
            )
            for block, constants in zip(self._blocks, self._constants, strict=True)
        ]

    def joined(self, parts: Sequence[LoraWeights]) -> LoraWeights:
        """The adapters of all blocks as one, in the order of the layout."""
        pairs = {
            target: pair
            for block, part in zip(self._blocks, parts, strict=True)
            for target, pair in zip(block.targets, part, strict=True)
        }
        return tuple(pairs[target] for target in range(len(pairs)))

    def begin(self, outside: Weights, token_ids: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """What the first block is given, `[batch, length, hidden]`; see `LanguageModel.hidden`."""
        given: list[jax.Array] = []

        def catch(x: jax.Array, *_: Any, **__: Any) -> jax.Array:
            given.append(x)
            return x

        self._around(outside, self._model.inputs(token_ids, segment_ids), catch)
        return given[0]

    def end(self, outside: Weights, x: jax.Array) -> jax.Array:
        """The last hidden states from what the last block gives, `[batch, length, hidden]`."""
        nothing = jnp.zeros(x.shape[:2], jnp.int32)
        return self._around(outside, self._model.inputs(nothing, nothing), lambda *_, **__: x)

    def logits(self, outside: Weights, hidden: jax.Array) -> jax.Array:
        """As `LanguageModel.logits`."""
        with keras.StatelessScope(state_mapping=self._mapping(outside)):
            logits = self._backbone.token_embedding(hidden, reverse=True)
        return jnp.asarray(logits, jnp.float32)

    def _mapping(self, outside: Weights) -> list[Any]:
        variables = [self._backbone.variables[place] for place in self._outside]
        return list(zip(variables, outside, strict=True))

    def _around(
        self, outside: Weights, inputs: Mapping[str, jax.Array], first: Callable[..., Any]
    ) -> jax.Array:
        """The backbone with `first` for its first block and nothing for the others."""
        layers = [block.layer for block in self._blocks]
        calls = [(layers[0], first), *((layer, _same) for layer in layers[1:])]
        scope = keras.StatelessScope(state_mapping=self._mapping(outside))
        with scope, replaced_calls(calls):
            outputs: jax.Array = self._backbone(inputs)
        return outputs

    def forward(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        segment_ids: jax.Array,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """A block.

        Args:
            kind: the number of the block that stands for it.
            arrays: what is its own.
            x: `[batch, length, hidden]`.
            segment_ids: int32 `[batch, length]`, as for `LanguageModel.hidden`.
            dropout: of the adapters' inputs.

        Returns:
            What the next block is given, and what `backward` wants to be kept.
        """
        results: dict[int, jax.Array] = {}

        def note(number: int, result: jax.Array) -> jax.Array:
            results[number] = result
            return result

        outputs = self._run(kind, arrays, x, segment_ids, dropout, note)
        keep = self._settings.remat == "matmuls"
        return outputs, tuple(results[n] for n in sorted(results)) if keep else ()

    def backward(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        segment_ids: jax.Array,
        kept: Sequence[jax.Array],
        gradient: jax.Array,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, LoraWeights]:
        """The gradients of a block's input and of its adapter.

        Args:
            kept: by `forward`; what is not kept is computed again.
            gradient: of what it gave.

        Other arguments as for `forward`.
        """

        def run(x: jax.Array, lora: LoraWeights) -> jax.Array:
            def instead(number: int, result: jax.Array) -> jax.Array:
                found: jax.Array = _given(result, kept[number]) if kept else result
                return found

            own = arrays._replace(lora=lora)
            return self._run(kind, own, x, segment_ids, dropout, instead)

        _, pull = jax.vjp(run, x, arrays.lora)
        gradients: tuple[jax.Array, LoraWeights] = pull(gradient)
        return gradients

    def _run(
        self,
        kind: int,
        arrays: BlockArrays,
        x: jax.Array,
        segment_ids: jax.Array,
        dropout: Dropout | None,
        see: Callable[[int, jax.Array], jax.Array],
    ) -> jax.Array:
        """A block, the result of each of its kernels passed through `see`."""
        block, model, settings = self._blocks[kind], self._model, self._settings
        layout, pairs = self._layout(block), arrays.lora
        layers = kernel_layers(block.layer)
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
            _wavelengths(block.layer, arrays.rotary),
            segment_attention(self._backbone) if settings.packed else nullcontext(),
            model.attention(segment_ids, settings.reach),
            lora_branches(self._backbone, layout, pairs, dropout, arrays.numbers),
            replaced_calls([(layer, _seen(layer.call, n, see)) for n, layer in enumerate(layers)]),
        ):
            outputs: jax.Array = block.layer.call(x, **{mask: segment_ids})
        return outputs

    def _layout(self, block: _Block) -> LoraLayout:
        layout = self._model.lora
        return replace(layout, targets=tuple(layout.targets[target] for target in block.targets))

    def _constant(self, block: _Block) -> tuple[jax.Array, jax.Array]:
        """The `rotary` and `numbers` of a block, on the devices."""
        turns = [[layer.max_wavelength, layer.scaling_factor] for layer in _rotaries(block.layer)]
        targets = self._layout(block).targets
        constants: tuple[jax.Array, jax.Array] = self._model.replicate(
            (
                np.asarray(turns, np.float32).reshape(-1, 2),
                np.asarray([target.layer_index for target in targets], np.int32),
            )
        )
        return constants

    def kept_shardings(self, kind: int) -> tuple[NamedSharding, ...]:
        """How what `forward` wants to be kept lies on the devices: split as the kernels are."""
        if self._settings.remat != "matmuls":
            return ()
        mesh = self._model.mesh
        return tuple(
            NamedSharding(mesh, jax.P("data", *_split(layer, mesh.shape[MODEL])))  # type: ignore[no-untyped-call]
            for layer in kernel_layers(self._blocks[kind].layer)
        )


def separate(model: LanguageModel, settings: ForwardConfig) -> Blocks | None:
    """A model block by block, or None where it cannot be taken apart.

    It can where a test shows that each block gets nothing but the hidden states and the mask, and
    all adapters are beside kernels of blocks; and where what is kept for the backward pass is the
    results of kernels, or nothing.
    """
    backbone = model.backbone
    known = type(backbone).__name__ in PACKABLE and backbone.compute_dtype != "float16"
    if not known or settings.remat == "none":
        return None
    place_of = {id(variable): place for place, variable in enumerate(backbone.variables)}
    numbered = weighted_layers(backbone)
    layers = list(backbone.transformer_layers)
    owner = {id(part): n for n, layer in enumerate(layers) for part in layer._flatten_layers()}

    if any(target.equations is None for target in model.lora.targets):
        return None
    owners = [owner[id(numbered[target.layer_index])] for target in model.lora.targets]
    kinds = _kinds(layers, settings.reach)
    blocks = [
        _Block(
            layer,
            tuple(place_of[id(variable)] for variable in layer.variables),
            tuple(target for target, of in enumerate(owners) if of == number),
            kind,
        )
        for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
    ]
    return Blocks(model, settings, blocks)


def _kinds(layers: Sequence[Any], reach: int | None) -> list[int]:
    """For each block the number of one that does the same with other arguments."""
    names = [_settings(layer, reach) for layer in layers]
    # A mask without a window takes less than one with a window that changes nothing.
    order = sorted(range(len(layers)), key=lambda number: _has_window(layers[number]))
    first = {names[number]: number for number in reversed(order)}
    return [first[name] for name in names]


def _settings(layer: Any, reach: int | None) -> tuple[Any, ...]:
    """What makes a difference to the function of a block, of those that differ in a family."""
    shapes = tuple(tuple(variable.shape) for variable in layer.variables)
    turns = [(part.max_wavelength, part.scaling_factor) for part in _rotaries(layer)]
    if all(_is_plain(part) for part in _rotaries(layer)):
        turns = []
    window = layer.sliding_window_size if _has_window(layer) else None
    if window is not None and reach is not None and reach <= window:
        window = None
    return type(layer), shapes, tuple(turns), window


def _has_window(layer: Any) -> bool:
    return bool(getattr(layer, "use_sliding_window_attention", False))


def _rotaries(layer: Any) -> list[Any]:
    parts = layer._flatten_layers(include_self=False)
    return [part for part in parts if isinstance(part, RotaryEmbedding)]


def _is_plain(rotary: Any) -> bool:
    """Whether a rotary embedding is told by its wavelength and its scaling."""
    ordinary = type(rotary)._get_inverse_freq is RotaryEmbedding._get_inverse_freq
    return ordinary and rotary.rope_type == "linear"


@contextlib.contextmanager
def _wavelengths(layer: Any, turns: jax.Array) -> Iterator[None]:
    """Within this block the rotary embeddings of a layer have these wavelengths and scalings."""
    plain = [(part, turn) for part, turn in zip(_rotaries(layer), turns, strict=True)]
    plain = [(part, turn) for part, turn in plain if _is_plain(part)]
    before = [(part.max_wavelength, part.scaling_factor) for part, _ in plain]
    for part, turn in plain:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        part.__dict__["max_wavelength"], part.__dict__["scaling_factor"] = turn[0], turn[1]
    try:
        yield
    finally:
        for (part, _), (wavelength, scaling) in zip(plain, before, strict=True):
            part.__dict__["max_wavelength"] = wavelength
            part.__dict__["scaling_factor"] = scaling


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _seen(
    call: Callable[..., Any], number: int, see: Callable[[int, jax.Array], jax.Array]
) -> Callable[..., Any]:
    def seen(x: Any, *args: Any, **kwargs: Any) -> Any:
        return see(number, call(x, *args, **kwargs))

    return seen


@jax.custom_vjp
def _given(result: jax.Array, kept: jax.Array) -> jax.Array:
    """What was kept of a result, to be differentiated as the result: which no one computes then."""
    del result
    return kept


def _given_forward(result: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _given(result, kept), kept


def _given_backward(kept: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.zeros_like(kept)


_given.defvjp(_given_forward, _given_backward)


def _split(layer: Any, parts: int) -> list[str | None]:
    """The axes, after the first, of a kernel's result on a mesh that splits the kernel."""
    axis = split_axis(layer._kernel.shape, parts)
    if axis is None:
        return []
    if isinstance(layer, keras.layers.Dense):
        return [None, MODEL] if axis == 1 else []
    inputs, _, output = layer.equation.partition("->")
    place = output.find(inputs.partition(",")[2][axis])
    return [] if place < 0 else [None] * (place - 1) + [MODEL]
