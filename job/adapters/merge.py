"""A merged model on disk: a transformers checkpoint, or a KerasHub preset.

A transformers checkpoint is copied file by file with the adapted matrices changed on the way, one
in memory at a time, in the checkpoint's own dtype; all other bytes stay the same. Only a model
from a KerasHub preset is loaded; its kernels are changed in place before it is saved.
"""

import json
import shutil
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from job.adapters.hf_weight_map import bare_name
from job.adapters.low_rank import LowRankUpdate
from job.adapters.peft_format import PeftAdapter
from job.adapters.safetensors_io import TensorFile
from job.chat.text_tokenizer import read_json
from job.errors import StageError, UsageError
from job.model.load import load_task
from job.model.lora import LoraLayout, LoraWeights
from job.model.patching import Patch, patched
from job.runtime import logs

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx")
"""Suffixes of weight files, which are not copied: they are rewritten, or are the base model's."""

SHARD_BYTES = 2_000_000_000


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a preset's folder is a transformers checkpoint in safetensors files."""
    is_config = "model_type" in read_json(folder / "config.json")
    return is_config and any((folder / name).is_file() for name in (_INDEX, _SINGLE))


def merge_checkpoint(source: Path, adapter: PeftAdapter, target: Path) -> None:
    """Copy a transformers checkpoint with an adapter merged in.

    Raises:
        StageError: the checkpoint is damaged, or lacks a matrix that the adapter adapts.
    """
    files = [_SINGLE]
    if (source / _INDEX).is_file():
        index = json.loads((source / _INDEX).read_bytes())
        files = sorted(set(index["weight_map"].values()))
    shards = {name: TensorFile(source / name) for name in files}
    updates = _updates(shards, adapter)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _WEIGHT_FILES:
            shutil.copyfile(path, target / path.name)
    for number, (name, shard) in enumerate(shards.items(), 1):
        shard.rewrite(target / name, updates)
        logs.get().info("shard written", file=name, number=number, of=len(shards))


def _updates(shards: Mapping[str, TensorFile], adapter: PeftAdapter) -> dict[str, LowRankUpdate]:
    """Return the adapter's update of each adapted tensor, by the tensor's name."""
    shapes = {name: shape for shard in shards.values() for name, shape in shard.shapes.items()}
    names = {bare_name(name): name for name in shapes}
    updates = {}
    for module, update in adapter.modules.items():
        name = names.get(f"{bare_name(module)}.weight")
        if name is None or shapes[name] != update.shape:
            actual = "no such matrix" if name is None else f"one of shape {shapes[name]}"
            raise StageError(
                f"the adapter adapts {module} of shape {update.shape}, but the model has {actual}"
            )
        updates[name] = update
    return updates


def merge_in_place(backbone: Any, layout: LoraLayout, lora: LoraWeights) -> None:
    """Add an adapter to the kernels of a backbone, one at a time."""
    variables = backbone.variables
    for target, (a, b) in zip(layout.targets, lora, strict=True):
        variable = variables[target.weight_index]
        kernel = np.asarray(variable.value)
        update = np.float32(layout.scale) * np.matmul(np.asarray(a), np.asarray(b))
        variable.assign((kernel.astype(np.float32) + update).astype(kernel.dtype))


def write_preset(task: Any, tokenizer: Any, target: Path) -> None:
    """Write a KerasHub preset, which `keras_hub.models.CausalLM.from_preset` reads."""
    tied = task.backbone.token_embedding.tie_weights
    ends = {"bos_token": "start_token", "eos_token": "end_token"}
    tokens = {name: getattr(tokenizer, attribute, None) for name, attribute in ends.items()}
    with patched([_saving(task.backbone, tie_word_embeddings=tied), _saving(tokenizer, **tokens)]):
        task.save_to_preset(str(target))
        tokenizer.save_to_preset(str(target))
    special = signature(type(tokenizer)).parameters.get("misc_special_tokens")
    if special is not None:  # Llama 3's demands them; without merges no text becomes their ids
        path = target / "assets/tokenizer/vocabulary.json"
        vocabulary = json.loads(path.read_text("utf-8"))
        for token in sorted(special.default - vocabulary.keys()):
            vocabulary[token] = max(vocabulary.values()) + 1
        path.write_text(json.dumps(vocabulary), "utf-8")


def _saving(layer: Any, **arguments: Any) -> Patch:
    """Make a layer's configuration hold arguments that KerasHub forgets to save."""
    original, known = layer.get_config, signature(type(layer)).parameters
    more = {name: value for name, value in arguments.items() if name in known}
    return Patch(layer, "get_config", lambda: more | original())


def check_export(backbone: Any, target: Path, dtype: str) -> None:
    """Load an export and compare its logits with those of its backbone in memory.

    Raises:
        StageError: it cannot be loaded, or is another model.
    """
    try:
        loaded = load_task(str(target), dtype)
    except UsageError as error:
        raise StageError(f"the export cannot be loaded again: {error}") from error
    expected, actual = _logits(backbone), _logits(loaded.backbone)
    within = (1e-3 if dtype == "float32" else 2e-2) * max(1.0, np.abs(expected).max())
    if not (difference := np.abs(actual - expected).max()) <= within:
        raise StageError(
            f"the export, loaded again, has other logits (by {difference:.2g}): its format does "
            f"not hold all that {type(backbone).__name__} computes with"
        )


def _logits(backbone: Any) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, backbone.vocabulary_size, (1, 128))
    batch = {"token_ids": ids, "padding_mask": ids * 0 + 1, "position_ids": np.arange(128)[None]}
    hidden = backbone({name: batch[name] for name in batch.keys() & backbone.input.keys()})
    return np.asarray(backbone.token_embedding(hidden, reverse=True), np.float32)


def write_checkpoint(backbone: Any, tokenizer: Any, target: Path) -> None:
    """Write a loaded model as a transformers checkpoint, in shards of `SHARD_BYTES`.

    Raises:
        UsageError: KerasHub cannot write this family's weights, configuration or tokenizer.
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
    weights = hf_exporter.MODEL_EXPORTERS[kind](backbone, include_lm_head=True)
    if backbone.token_embedding.tie_weights:
        weights.pop("lm_head.weight", None)
    tensors = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, target / file, {"format": "pt"})
        logs.get().info("shard written", file=file)
    if shards.is_sharded:
        content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (target / _INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
