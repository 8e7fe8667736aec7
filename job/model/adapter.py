"""Adapters on file, in KerasHub's own format: `backbone.load_lora_weights` reads them.

The format has a rank but no alpha, and KerasHub then takes alpha = rank. The factor
alpha / rank is therefore multiplied into B on writing, so that the file means the same
model to every reader; read back here, it has alpha = rank too.
"""

from dataclasses import replace
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np

from job.errors import StageError
from job.model.lora import LoraLayout, LoraWeights


def save_adapter(path: Path, layout: LoraLayout, lora: LoraWeights) -> None:
    """Write an adapter; the same weights give the same bytes."""
    with h5py.File(path, "w") as file:
        group = file.create_group("lora")
        variables = group.create_group("vars")
        variables["rank"] = layout.rank
        for target, (a, b) in zip(layout.targets, lora, strict=True):
            inner = group.create_group(f"{target.layer_index}/vars")
            inner["lora_kernel_a"] = np.asarray(a, np.float32)
            inner["lora_kernel_b"] = np.asarray(b, np.float32) * np.float32(layout.scale)


def load_adapter(path: Path, layout: LoraLayout) -> tuple[LoraLayout, LoraWeights]:
    """Read an adapter for the same targets.

    Returns:
        The layout that the file's weights belong to (alpha = rank), and the weights.

    Raises:
        StageError: the file is not a LoRA file, or is of another rank or of other layers.
    """
    try:
        with h5py.File(path, "r") as file:
            rank = int(file["lora/vars/rank"][()])
            if rank != layout.rank:
                raise StageError(f"{path.name} is of rank {rank}, and the spec says {layout.rank}")
            pairs = []
            for target in layout.targets:
                inner = file[f"lora/{target.layer_index}/vars"]
                a, b = inner["lora_kernel_a"][()], inner["lora_kernel_b"][()]
                if (a.shape, b.shape) != layout.shapes(target):
                    raise StageError(
                        f"{path.name}: the adapter of {target.path} has shapes {a.shape} and "
                        f"{b.shape}, the model needs {layout.shapes(target)}"
                    )
                pairs.append((jnp.asarray(a), jnp.asarray(b)))
    except (OSError, KeyError) as error:
        raise StageError(f"{path.name} is not a LoRA file of this model: {error}") from error
    return replace(layout, alpha=float(rank), rslora=False), tuple(pairs)
