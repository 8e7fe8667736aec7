"""The model with its adapter merged in, on disk: for transformers, and as a KerasHub preset.

A transformers checkpoint is copied file by file with the adapted matrices changed on the way,
one in memory at a time, in the checkpoint's own type; everything else stays to the byte. Only
where the model came as a KerasHub preset is it loaded, once, and its kernels are changed in
place before they are written.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from job.adapters.hf_weight_map import bare_name, checkpoint_ports, inverted
from job.adapters.low_rank import Factors
from job.adapters.peft_format import PeftAdapter
from job.adapters.safetensors_io import TensorFile, save_tensors
from job.errors import StageError, UsageError
from job.model.lora import LoraLayout, LoraWeights, weighted_layers
from job.runtime import logs

_INDEX = "model.safetensors.index.json"


_WHOLE = "model.safetensors"


_LEFT_OUT = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx")
"""Endings of files of weights, which are written anew or would be the base model's."""


SHARD_BYTES = 2_000_000_000


def is_checkpoint(folder: Path) -> bool:
    """Whether a preset's folder is a transformers checkpoint in safetensors files."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return "model_type" in config and any((folder / name).is_file() for name in (_INDEX, _WHOLE))


def _shards(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return [_WHOLE]
    index = json.loads((folder / _INDEX).read_bytes())
    return sorted(set(index["weight_map"].values()))


def merge_checkpoint(source: Path, adapter: PeftAdapter, target: Path) -> None:
    """Copy a transformers checkpoint with an adapter merged in.

    Raises:
        StageError: the checkpoint is damaged, or lacks a matrix that the adapter is of.
    """
    shards = {name: TensorFile(source / name) for name in _shards(source)}
    changes = _changes(shards, adapter)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _LEFT_OUT:
            shutil.copyfile(path, target / path.name)
    for number, (name, shard) in enumerate(shards.items(), 1):
        shard.rewrite(target / name, changes)
        logs.get().info("merged", file=name, number=number, of=len(shards))


def _changes(
    shards: Mapping[str, TensorFile], adapter: PeftAdapter
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What is to be done to which tensor."""
    there = {bare_name(name): e for shard in shards.values() for name, e in shard.entries.items()}
    changes = {}
    for module, factors in adapter.modules.items():
        entry = there.get(f"{bare_name(module)}.weight")
        shape = (factors.b.shape[0], factors.a.shape[1])
        if entry is None or entry.shape != shape:
            found = "no such matrix" if entry is None else f"one of shape {entry.shape}"
            raise StageError(f"the adapter is of {module} {shape}, and the model has {found}")
        changes[entry.name] = _adding(factors)
    return changes


def _adding(factors: Factors) -> Callable[[np.ndarray], np.ndarray]:
    return lambda matrix: matrix + factors.delta()


def merge_in_place(backbone: Any, layout: LoraLayout, lora: LoraWeights) -> None:
    """Add an adapter to the kernels of a backbone, one after the other."""
    variables = backbone.variables
    for target, (a, b) in zip(layout.targets, lora, strict=True):
        variable = variables[target.weight_index]
        kernel = np.asarray(variable.value)
        update = np.float32(layout.scale) * np.matmul(np.asarray(a), np.asarray(b))
        variable.assign((kernel.astype(np.float32) + update).astype(kernel.dtype))


def write_preset(task: Any, tokenizer: Any, target: Path) -> None:
    """Write a KerasHub preset: `keras_hub.models.CausalLM.from_preset` reads the folder."""
    task.save_to_preset(str(target))
    tokenizer.save_to_preset(str(target))


def write_checkpoint(backbone: Any, tokenizer: Any, target: Path) -> None:
    """Write a loaded model as a transformers checkpoint, a shard in memory at a time.

    Raises:
        UsageError: KerasHub cannot write this family's configuration or tokenizer, or its
            weights are not those of a checkpoint in another order.
    """
    from keras_hub.src.utils.transformers.export import hf_exporter

    kind = type(backbone).__name__
    if kind not in hf_exporter.MODEL_CONFIGS:
        raise UsageError(
            f"KerasHub cannot write the transformers configuration of {kind}; start from the "
            "model's transformers checkpoint (hf://owner/name), or use --to merged-keras"
        )
    config = hf_exporter.MODEL_CONFIGS[kind](backbone)
    ids = {"bos": "start_token_id", "eos": "end_token_id", "pad": "pad_token_id"}
    for name, attribute in ids.items():
        if (number := getattr(tokenizer, attribute, None)) is not None:
            config[f"{name}_token_id"] = int(number)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    try:
        hf_exporter.export_tokenizer(tokenizer, str(target))
    except ValueError as error:
        raise UsageError(f"the tokenizer cannot be written for transformers: {error}") from error
    _write_weights(backbone, target)


def _write_weights(backbone: Any, target: Path) -> None:
    ports = checkpoint_ports(backbone)
    kernels = {
        id(layer._kernel): layer for layer in weighted_layers(backbone) if _has_kernel(layer)
    }
    groups: list[list[int]] = [[]]
    size = 0
    for number, port in enumerate(ports):
        if size and size + port.variable.value.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += port.variable.value.nbytes
    names = [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else _WHOLE
        for number in range(1, len(groups) + 1)
    ]

    def tensors(group: list[int]) -> Iterator[tuple[str, np.ndarray]]:
        for number in group:
            port = ports[number]
            way = inverted(port, kernels.get(id(port.variable)))
            yield port.name, way(np.asarray(port.variable.value))

    for name, group in zip(names, groups, strict=True):
        save_tensors(target / name, tensors(group))
        logs.get().info("merged", file=name)
    if len(groups) > 1:
        places = {ports[n].name: name for name, g in zip(names, groups, strict=True) for n in g}
        total = sum(port.variable.value.nbytes for port in ports)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _has_kernel(layer: Any) -> bool:
    return getattr(layer, "_kernel", None) is not None
