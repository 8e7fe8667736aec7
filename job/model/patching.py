"""How a backbone is traced for training: LoRA beside the kernels, blocks rematerialized.

KerasHub's layers are the structure; while a function is traced inside these blocks, some of
their `call` methods are replaced, and afterwards they are as before.

Beside the kernel (`x @ W + scale * (x @ A) @ B`) rather than inside it (`x @ (W + ...)`), the
gradient of a frozen kernel is never formed, and a small update is not rounded away when the
kernel is bfloat16.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.ad_checkpoint import checkpoint_name
from keras import ops
from keras_hub.layers import RotaryEmbedding

from job.model.lora import LoraLayout, LoraWeights, weighted_layers

Remat = Literal["none", "matmuls", "blocks"]


_RESULT = "result"
"""The name of what a layer with a kernel gives, for `jax.checkpoint`."""


@contextlib.contextmanager
def replaced_calls(replacements: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Within this block, layers run these functions instead of their own `call`."""
    before = [(layer.__dict__, layer.__dict__.get("call")) for layer, _ in replacements]
    for layer, function in replacements:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__["call"] = function
    try:
        yield
    finally:
        for attributes, function in before:
            if function is None:
                del attributes["call"]
            else:
                attributes["call"] = function


class Dropout(NamedTuple):
    """A share of the adapters' inputs to drop, and the random key that says which."""

    rate: float
    key: jax.Array


def lora_branches(
    backbone: Any,
    layout: LoraLayout,
    lora: LoraWeights,
    dropout: Dropout | None,
    numbers: jax.Array | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Within this block the adapted layers add their adapter's output to their own.

    Args:
        numbers: int32 `[targets]`, from which their dropout follows; those of the layers if unset.
    """
    layers = weighted_layers(backbone)
    replacements = []
    for place, (target, (a, b)) in enumerate(zip(layout.targets, layout.scaled(lora), strict=True)):
        if target.equations is not None:
            layer = layers[target.layer_index]
            number = target.layer_index if numbers is None else numbers[place]
            drop = _dropper(dropout, number)
            replacements.append((layer, _beside(layer, target.equations, a, b, drop)))
    return replaced_calls(replacements)


def kernel_layers(block: Any) -> list[Any]:
    """The layers of a block that multiply by a kernel, in its own order."""
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    return [part for part in block._flatten_layers(include_self=False) if isinstance(part, kinds)]


def _dropper(dropout: Dropout | None, number: int | jax.Array) -> Callable[[Any], Any]:
    """Inverted dropout (Srivastava et al. 2014) with a key of the layer's own."""
    if dropout is None or not dropout.rate:
        return lambda x: x
    key, keep = jax.random.fold_in(dropout.key, number), 1.0 - dropout.rate

    def drop(x: Any) -> Any:
        kept = jax.random.bernoulli(key, keep, x.shape)
        return ops.where(kept, x / ops.cast(keep, x.dtype), ops.zeros_like(x))

    return drop


def _beside(
    layer: Any, equations: tuple[str, str], a: Any, b: Any, drop: Callable[[Any], Any]
) -> Callable[..., Any]:
    frozen = layer.call

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        inner = ops.einsum(equations[0], drop(x), ops.cast(a, x.dtype))
        return frozen(x, *args, **kwargs) + ops.einsum(equations[1], inner, ops.cast(b, x.dtype))

    return call


def remat_blocks(backbone: Any, remat: Remat) -> contextlib.AbstractContextManager[None]:
    """Within this block each decoder block keeps less for the backward pass.

    `matmuls` keeps what layers with kernels give, their adapters included, and computes the rest
    again: elementwise work and attention scores, a few percent of the time for a third of the
    memory. `blocks` keeps only each block's input: least memory, one more forward pass.
    """
    if remat == "none":
        return contextlib.nullcontext()
    policies = jax.checkpoint_policies
    policy, noted = policies.nothing_saveable, []
    blocks = getattr(backbone, "transformer_layers", [])
    if remat == "matmuls" and all(map(_all_in_kernel_layers, blocks)):
        policy = policies.save_only_these_names(_RESULT)
        noted = [layer for block in blocks for layer in kernel_layers(block)]
    elif remat == "matmuls":
        # Experts multiply by kernels in layers of their own.
        policy = policies.dots_with_no_batch_dims_saveable
    calls = [(layer, _noted(layer)) for layer in noted]
    return replaced_calls([*calls, *((block, _checkpointed(block, policy)) for block in blocks)])


def _all_in_kernel_layers(block: Any) -> bool:
    known = {id(variable) for layer in kernel_layers(block) for variable in layer.variables}
    return all(len(v.shape) < 2 or id(v) in known for v in block.variables)


def _noted(layer: Any) -> Callable[..., Any]:
    whole = layer.call

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint_name(whole(x, *args, **kwargs), _RESULT)  # type: ignore[no-untyped-call]

    return call


def _checkpointed(block: Any, policy: Any) -> Callable[..., Any]:
    whole = block.call

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return jax.checkpoint(lambda h: whole(h, *args, **kwargs), policy=policy)(x)

    return call


def _by_halves(x: Any, cosines: Any, sines: Any) -> Any:
    """Pairs of `x` `[..., features]` turned by angles whose two halves are the same."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cosines, sines = cosines[..., :half], sines[..., :half]
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1)


@contextlib.contextmanager
def fast_rotary(backbone: Any) -> Iterator[None]:
    """Within this block the rotary embeddings of a backbone work half by half."""
    layers = [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, RotaryEmbedding)
        and type(layer)._apply_rotary_pos_emb is RotaryEmbedding._apply_rotary_pos_emb
    ]
    for layer in layers:
        # Straight into the instance's dictionary: Keras tracks ordinary attributes.
        layer.__dict__["_apply_rotary_pos_emb"] = _by_halves
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_apply_rotary_pos_emb"]


_HALVES = {
    "Gemma3Backbone": ("pre_ffw_norm", ("post_ffw_norm", "ffw_linear")),
    "GemmaBackbone": ("pre_ffw_norm", ("post_ffw_norm", "ffw_linear")),
    "LlamaBackbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "Llama3Backbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "MistralBackbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
    "Qwen3Backbone": ("_feedforward_layernorm", ("_feedforward_output_dense",)),
}
"""First layer of a block's feed-forward half, and its last: the first of these names it has.

Families whose block is `h + last(...first(h))` after its attention, as a test shows.
"""


def gather(hidden: jax.Array, positions: jax.Array) -> jax.Array:
    """The hidden states that have a loss.

    Args:
        hidden: `[rows, length, hidden]`.
        positions: int32 `[groups, losses]` into the tokens of each equal part of the rows.

    Returns:
        `[groups, losses, hidden]`.
    """
    grouped = hidden.reshape(positions.shape[0], -1, hidden.shape[-1])
    return jnp.take_along_axis(grouped, positions[..., None], axis=1)


def can_narrow(backbone: Any) -> bool:
    """Whether the last block of this backbone can be cut in two."""
    return type(backbone).__name__ in _HALVES and backbone.compute_dtype != "float16"


@contextlib.contextmanager
def narrow_last_block(backbone: Any, positions: jax.Array) -> Iterator[None]:
    """Within this block the backbone gives the hidden states at `positions` alone.

    They are `[groups, losses, hidden]`, as by `gather` of what it would give otherwise.
    """
    block = backbone.transformer_layers[-1]
    first, last = _halves(backbone, block)
    whole, enter, leave = block.call, first.call, last.call
    kept: dict[str, jax.Array] = {}

    def begin(x: Any, *args: Any, **kwargs: Any) -> Any:
        kept["residual"] = gather(x, positions)
        return enter(kept["residual"], *args, **kwargs)

    def end(x: Any, *args: Any, **kwargs: Any) -> Any:
        kept["update"] = leave(x, *args, **kwargs)
        return jnp.zeros((1, 1, 1), x.dtype)  # the block adds this to all positions, for nothing

    def narrow(x: Any, *args: Any, **kwargs: Any) -> Any:
        whole(x, *args, **kwargs)
        return kept["residual"] + kept["update"]

    with replaced_calls([(first, begin), (last, end), (block, narrow)]):
        yield


def _halves(backbone: Any, block: Any) -> tuple[Any, Any]:
    first, names = _HALVES[type(backbone).__name__]
    last = next(layer for name in names if (layer := getattr(block, name, None)) is not None)
    return getattr(block, first), last
