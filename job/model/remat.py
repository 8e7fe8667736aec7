"""Rematerialization: how much each decoder block saves for the backward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
import keras
from jax.ad_checkpoint import checkpoint_name

from job.model.patching import Patch, output_patch, patched

Remat = Literal["none", "matmuls", "blocks"]
_RESULT = "result"
"""The name, for `jax.checkpoint`, of the output of a layer with a kernel."""


def kernel_layers(block: Any) -> list[Any]:
    """List the layers inside a block that multiply by a kernel, in KerasHub's order."""
    kinds = (keras.layers.Dense, keras.layers.EinsumDense)
    return [part for part in block._flatten_layers(include_self=False) if isinstance(part, kinds)]


def remat_blocks(backbone: Any, remat: Remat) -> AbstractContextManager[None]:
    """Make each decoder block save less for the backward pass.

    `matmuls` saves the outputs of layers with kernels, LoRA branches included, and recomputes
    elementwise work and attention scores: a few percent of the time for a third of the memory.
    `blocks` saves only each block's input: least memory, one more forward pass.
    """
    if remat == "none":
        return patched([])
    policies = jax.checkpoint_policies
    policy, named = policies.nothing_saveable, []
    blocks = getattr(backbone, "transformer_layers", [])
    if remat == "matmuls" and all(map(_all_in_kernel_layers, blocks)):
        policy = policies.save_only_these_names(_RESULT)
        named = [layer for block in blocks for layer in kernel_layers(block)]
    elif remat == "matmuls":
        # Mixtures of experts use custom layers for their kernels.
        policy = policies.dots_with_no_batch_dims_saveable
    return patched([
        *(output_patch(layer, _name_result) for layer in named),
        *(Patch(block, "call", _checkpointed(block.call, policy)) for block in blocks),
    ])  # fmt: skip


def _all_in_kernel_layers(block: Any) -> bool:
    known = {id(variable) for layer in kernel_layers(block) for variable in layer.variables}
    return all(len(v.shape) < 2 or id(v) in known for v in block.variables)


def _name_result(result: Any) -> Any:
    return checkpoint_name(result, _RESULT)  # type: ignore[no-untyped-call]


def _checkpointed(original: Callable[..., Any], policy: Any) -> Callable[..., Any]:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return jax.checkpoint(lambda h: original(h, *args, **kwargs), policy=policy)(x)

    return call
