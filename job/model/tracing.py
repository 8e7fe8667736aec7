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
from keras import ops

from job.model.lora import LoraLayout, LoraWeights, weighted_layers

Remat = Literal["none", "matmuls", "blocks"]


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


def lora_beside(
    backbone: Any, layout: LoraLayout, lora: LoraWeights, dropout: Dropout | None
) -> contextlib.AbstractContextManager[None]:
    """Within this block the adapted layers add their adapter's output to their own."""
    layers = weighted_layers(backbone)
    replacements = []
    for target, (a, b) in zip(layout.targets, layout.scaled(lora), strict=True):
        if target.equations is not None:
            layer = layers[target.layer_index]
            drop = _dropper(dropout, target.layer_index)
            replacements.append((layer, _beside(layer, target.equations, a, b, drop)))
    return replaced_calls(replacements)


def _dropper(dropout: Dropout | None, number: int) -> Callable[[Any], Any]:
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


def rematerialized(backbone: Any, remat: Remat) -> contextlib.AbstractContextManager[None]:
    """Within this block each decoder block keeps less for the backward pass.

    `matmuls` keeps the results of matrix products with weights and computes the rest again:
    elementwise work and attention scores, a few percent of the time for a third of the
    memory. `blocks` keeps only each block's input: least memory, one more forward pass.
    """
    if remat == "none":
        return contextlib.nullcontext()
    policies = jax.checkpoint_policies
    policy = (
        policies.dots_with_no_batch_dims_saveable
        if remat == "matmuls"
        else policies.nothing_saveable
    )
    blocks = getattr(backbone, "transformer_layers", [])
    return replaced_calls([(block, _checkpointed(block, policy)) for block in blocks])


def _checkpointed(block: Any, policy: Any) -> Callable[..., Any]:
    whole = block.call

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return jax.checkpoint(lambda h: whole(h, *args, **kwargs), policy=policy)(x)

    return call
