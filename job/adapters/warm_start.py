"""The adapter that training starts from: fresh weights, or an earlier adapter's.

An earlier adapter may be in KerasHub's or PEFT's format, with a lower rank, fewer layers and
another alpha. It is loaded exactly, or refused with what would have to change.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from job.adapters.hf_weight_map import bare_name, target_matrices
from job.adapters.keras_format import DESCRIPTION, H5, check_model, load_layers, read_info
from job.adapters.locate import AdapterFiles
from job.adapters.peft_format import PeftAdapter, read_peft
from job.errors import UsageError
from job.model.language_model import LanguageModel
from job.model.lora import LoraLayout, LoraWeights
from job.runtime import logs
from job.spec.schema import Spec

_WHERE = "train.init_adapter"
KernelFactors = Mapping[int, tuple[np.ndarray, np.ndarray, float]]
"""A `[..., rank]`, B `[rank, last]` and the factor of `A @ B`, by layer index."""


def starting_lora(
    spec: Spec, model: LanguageModel, earlier: AdapterFiles | None, work: Path
) -> LoraWeights:
    """Return the adapter that training starts from: fresh weights, or `earlier`, copied to `work`.

    Raises:
        UsageError: the earlier adapter does not fit this model, its targets or its ranks.
        StageError: its files are damaged.
    """
    layout, start = model.lora, model.lora.init(spec.seed)
    if earlier is None:
        return start
    folder = earlier.fetch(work)
    if earlier.kind == "keras":
        factors = _from_keras(folder, spec, model)
    else:
        factors = _from_peft(read_peft(folder), model)
    logs.get().info(
        "starting from adapter",
        adapter=spec.train.init_adapter,
        format=earlier.kind,
        layers=len(factors),
    )
    return _fit(layout, start, factors)


def _from_keras(folder: Path, spec: Spec, model: LanguageModel) -> KernelFactors:
    """Return the factors of an adapter in KerasHub's format."""
    layout, info = model.lora, read_info(folder / DESCRIPTION)
    check_model(info, spec.model.preset, model.family, _WHERE)
    if info.revision != model.preset.revision:
        logs.get().warning(
            "adapter was trained on a different model revision",
            adapter=info.revision,
            model=model.preset.revision,
        )
    shapes = {target.layer_index: list(target.kernel_shape) for target in layout.targets}
    _check_targets([layer.path for layer in info.layers if layer.index not in shapes], layout)
    for layer in info.layers:
        if layer.kernel != shapes[layer.index]:
            raise UsageError(
                f"{_WHERE}: the kernel of {layer.path} has shape {tuple(layer.kernel)} in the "
                f"adapter and {tuple(shapes[layer.index])} in {spec.model.preset}"
            )
    kernels = {layer.index: layer.kernel for layer in info.layers}
    pairs = load_layers(folder / H5, info.rank, kernels)
    return {index: (a, b, 1.0) for index, (a, b) in pairs.items()}


def _check_targets(unknown: Sequence[str], layout: LoraLayout) -> None:
    if unknown:
        targets = sorted({target.path.rpartition("/")[2] for target in layout.targets})
        raise UsageError(
            f"{_WHERE}: it adapts {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}, "
            f"which model.lora.targets ({', '.join(targets)}) leaves out; add them"
        )


def _from_peft(adapter: PeftAdapter, model: LanguageModel) -> KernelFactors:
    """Return the kernels' factors for an adapter in PEFT's format."""
    layout = model.lora
    matrices = {
        bare_name(matrix.module): (target.layer_index, matrix)
        for target, matrix in zip(
            layout.targets, target_matrices(model.backbone, layout), strict=True
        )
    }
    _check_targets([name for name in adapter.modules if bare_name(name) not in matrices], layout)
    factors = {}
    for name, update in adapter.modules.items():
        layer_index, matrix = matrices[bare_name(name)]
        if update.shape != matrix.shape:
            raise UsageError(
                f"{_WHERE}: {name} has shape {update.shape} in the adapter and {matrix.shape} in "
                f"the model: the adapter belongs to another model ({adapter.base})"
            )
        factors[layer_index] = (*matrix.kernel_factors(update), update.scale)
    return factors


def _fit(layout: LoraLayout, start: LoraWeights, factors: KernelFactors) -> LoraWeights:
    """Bring factors to the layout's rank and alpha; layers without factors keep fresh weights."""
    needed = max(a.shape[-1] for a, _, _ in factors.values())
    if needed > layout.rank:
        raise UsageError(
            f"{_WHERE}: the adapter needs rank {needed} here, and model.lora.rank is "
            f"{layout.rank}; raise it to {needed}"
        )
    pairs = []
    for target, (fresh_a, fresh_b) in zip(layout.targets, start, strict=True):
        if target.layer_index not in factors:
            pairs.append((fresh_a, fresh_b))
            continue
        a, b, scale = factors[target.layer_index]
        b = b if scale == layout.scale else b * np.float32(scale / layout.scale)
        # Extra rank starts as fresh weights do: B zero, A not.
        rank = a.shape[-1]
        padded_a = np.concatenate([a, np.asarray(fresh_a)[..., rank:]], axis=-1)
        padded_b = np.pad(b, ((0, layout.rank - rank), (0, 0)))
        pairs.append((jnp.asarray(padded_a), jnp.asarray(padded_b)))
    return tuple(pairs)
