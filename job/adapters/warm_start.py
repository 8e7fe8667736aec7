"""The weights training starts from: fresh ones, or those of an earlier adapter.

An earlier adapter may be ours or PEFT's, of a lower rank, of fewer layers and of another alpha:
it is taken over exactly, or refused with what would have to change.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from job.adapters.hf_weight_map import bare_name, target_matrices
from job.adapters.keras_format import DESCRIPTION, H5, check_model, load_layers, read_info
from job.adapters.locate import fetch_adapter
from job.adapters.low_rank import Matrix
from job.adapters.peft_format import PeftAdapter, read_peft
from job.errors import UsageError
from job.model.language_model import LanguageModel
from job.model.lora import LoraLayout, LoraWeights
from job.runtime import logs
from job.spec.pinning import Revisions
from job.spec.schema import Spec

_WHERE = "train.init_adapter"


Found = Mapping[int, tuple[np.ndarray, np.ndarray, float]]
"""A, B and their factor, by the number of the layer."""


def starting_lora(
    spec: Spec, model: LanguageModel, revisions: Revisions, work: Path
) -> LoraWeights:
    """Return the adapter that training starts from: fresh weights, or an earlier adapter.

    Args:
        spec: names the earlier adapter, if any, in `train.init_adapter`.
        model: the model to adapt.
        revisions: pinned commits of Hub repositories.
        work: a folder for local copies.

    Raises:
        UsageError: the earlier adapter does not fit this model, its targets or its ranks.
        StageError: its files are damaged.
    """
    layout, start = model.lora, model.lora.start(spec.seed)
    uri = spec.train.init_adapter
    if uri is None:
        return start
    kind, folder = fetch_adapter(uri, _WHERE, revisions, work)
    if kind == "ours":
        factors = _ours(folder, spec, model)
    else:
        factors = from_peft(read_peft(folder), layout, target_matrices(model.backbone, model.lora))
    logs.get().info("adapter loaded to start from", adapter=uri, format=kind, layers=len(factors))
    return fitted(layout, start, factors)


def _ours(folder: Path, spec: Spec, model: LanguageModel) -> Found:
    """Return the factors of an adapter in KerasHub's format."""
    layout, info = model.lora, read_info(folder / DESCRIPTION)
    check_model(info, spec.model.preset, model.family, _WHERE)
    if info.revision != model.preset.revision:
        logs.get().warning(
            "the adapter was trained on another commit of the model",
            adapter=info.revision,
            model=model.preset.revision,
        )
    adapted = {layer.index: layer for layer in info.layers}
    shapes = {target.layer_index: list(target.kernel_shape) for target in layout.targets}
    _check_targets([layer.path for index, layer in adapted.items() if index not in shapes], layout)
    for index, layer in adapted.items():
        if layer.kernel != shapes[index]:
            raise UsageError(
                f"{_WHERE}: the kernel of {layer.path} has shape {tuple(layer.kernel)} there "
                f"and {tuple(shapes[index])} in {spec.model.preset}"
            )
    pairs = load_layers(folder / H5, info)
    return {index: (a, b, 1.0) for index, (a, b) in pairs.items()}


def _check_targets(unknown: Sequence[str], layout: LoraLayout) -> None:
    if unknown:
        ours = sorted({target.path.rpartition("/")[2] for target in layout.targets})
        raise UsageError(
            f"{_WHERE}: it adapts {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''}, "
            f"which model.lora.targets ({', '.join(ours)}) leaves out; add them"
        )


def from_peft(adapter: PeftAdapter, layout: LoraLayout, matrices: Sequence[Matrix]) -> Found:
    """A PEFT adapter as factors of kernels.

    Raises:
        UsageError: it adapts other layers, or layers of other shapes.
    """
    places = {bare_name(matrix.module): place for place, matrix in enumerate(matrices)}
    _check_targets([name for name in adapter.modules if bare_name(name) not in places], layout)
    found = {}
    for name, factors in adapter.modules.items():
        place = places[bare_name(name)]
        shape = (factors.b.shape[0], factors.a.shape[1])
        if shape != matrices[place].shape:
            raise UsageError(
                f"{_WHERE}: {name} is of a layer {shape}, and the model's is "
                f"{matrices[place].shape}: the adapter is of another model ({adapter.base})"
            )
        found[layout.targets[place].layer_index] = (
            *matrices[place].to_kernel(factors),
            factors.scale,
        )
    return found


def fitted(layout: LoraLayout, start: LoraWeights, found: Found) -> LoraWeights:
    """An adapter at the layout's rank and alpha; layers it does not have start afresh.

    Raises:
        UsageError: it needs a higher rank.
    """
    needed = max(a.shape[-1] for a, _, _ in found.values())
    if needed > layout.rank:
        raise UsageError(
            f"{_WHERE}: the adapter is of rank {needed} here, and model.lora.rank is "
            f"{layout.rank}; raise it to {needed}"
        )
    pairs = []
    for target, (fresh_a, fresh_b) in zip(layout.targets, start, strict=True):
        if target.layer_index not in found:
            pairs.append((fresh_a, fresh_b))
            continue
        a, b, scale = found[target.layer_index]
        b = b if scale == layout.scale else b * np.float32(scale / layout.scale)
        # More rank than it has starts as fresh weights do: B zero, A not.
        rank = a.shape[-1]
        whole_a = np.concatenate([a, np.asarray(fresh_a)[..., rank:]], axis=-1)
        whole_b = np.pad(b, ((0, layout.rank - rank), (0, 0)))
        pairs.append((jnp.asarray(whole_a), jnp.asarray(whole_b)))
    return tuple(pairs)
