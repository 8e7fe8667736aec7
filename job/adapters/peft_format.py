"""Adapters in PEFT's format: a folder with `adapter_model.safetensors` and `adapter_config.json`.

Ranks may differ between layers (`rank_pattern`), since an adapter whose heads share B in Keras has
heads times its rank here. The factor of `B @ A` is the same for all layers, so readers that know
only one rank and one alpha compute the same model. This module needs numpy only.
"""

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.adapters.low_rank import LinearMatrix, LowRankUpdate, pad_rank
from job.adapters.safetensors_io import TensorFile
from job.errors import StageError, UsageError
from job.runtime import logs

if TYPE_CHECKING:
    from job.model.language_model import LanguageModel
    from job.model.lora import LoraWeights
    from job.spec.schema import Model

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter by the names of the transformers model's layers."""

    base: str
    """Name or path of the base model."""
    revision: str | None
    """The base model's commit."""
    rank: int
    """The rank it was trained at."""
    dropout: float
    """The dropout it was trained with."""
    modules: Mapping[str, LowRankUpdate]
    """The update of each layer's matrix, by the layer's name."""


class _Config(BaseModel):
    """The fields of an `adapter_config.json` that matter here."""

    model_config = ConfigDict(extra="ignore")

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(gt=0)
    lora_alpha: float
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    layer_replication: list[Any] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of `B @ A` of a layer."""
        # PEFT's rule: a key matches the end of a layer's name, and the first match counts.
        patterns = (self.alpha_pattern or {}).items()
        matches = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(matches, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def unsupported(self) -> str | None:
        """Name something in it that is more than A and B of linear layers, or return None."""
        extras = {
            f"peft_type {self.peft_type}": self.peft_type != "LORA",
            "DoRA": self.use_dora,
            "biases": self.bias != "none" or self.lora_bias,
            "modules_to_save": bool(self.modules_to_save),
            "layer_replication": bool(self.layer_replication),
            "fan_in_fan_out": self.fan_in_fan_out,
        }
        return next((name for name, present in extras.items() if present), None)


def base_name(preset: str) -> str:
    """Return the base model's name: on the Hub, or of the preset; a folder's with a warning."""
    if preset.startswith("hf://"):
        return preset.removeprefix("hf://")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name = str(json.loads((Path(preset) / "config.json").read_bytes()).get("_name_or_path"))
        known = re.fullmatch(r"(\w[\w.-]*)/[\w.-]+", name)
        if known and known[1] not in ("outputs", "output", "models", "checkpoints", "runs"):
            return name
    name = Path(preset).absolute().name
    if Path(preset).is_dir():
        logs.get().warning("base model has no Hub name; pass it to PEFT explicitly", name=name)
    return name


def to_peft(
    model: "LanguageModel", spec: "Model", lora: "LoraWeights", matrices: Sequence[LinearMatrix]
) -> PeftAdapter:
    """Convert LoRA weights exactly; `matrices` are those of `hf_weight_map.target_matrices`."""
    layout = model.lora
    return PeftAdapter(
        base=base_name(spec.preset),
        revision=model.preset.revision,
        rank=layout.rank,
        dropout=spec.lora.dropout,
        modules={
            matrix.module: matrix.matrix_update(np.asarray(a), np.asarray(b), layout.scale)
            for matrix, (a, b) in zip(matrices, lora, strict=True)
        },
    )


def peft_files(adapter: PeftAdapter) -> dict[str, bytes]:
    """Return the contents of an adapter's two files; the same adapter gives the same bytes."""
    tensors = {}
    for module, update in sorted(adapter.modules.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = update.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = update.b
    text = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
    return {
        PEFT_WEIGHTS: safetensors.numpy.save(tensors, metadata={"format": "pt"}),
        PEFT_CONFIG: text.encode(),
    }


def _config(adapter: PeftAdapter) -> dict[str, Any]:
    scale = next(iter(adapter.modules.values())).scale
    assert all(math.isclose(update.scale, scale) for update in adapter.modules.values())
    ranks = {module: update.rank for module, update in adapter.modules.items()}
    distinct = set(ranks.values())
    rank = distinct.pop() if len(distinct) == 1 else adapter.rank
    other = _patterns({module: r for module, r in ranks.items() if r != rank}, ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": adapter.dropout,
        "target_modules": _targets(list(ranks)),
        "rank_pattern": other,
        "alpha_pattern": {key: _number(scale * value) for key, value in other.items()},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _patterns(other: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
    """Return `rank_pattern`, by the last part of names if those layers share a rank."""
    same = Counter((_leaf(module), rank) for module, rank in ranks.items())
    total = Counter(_leaf(module) for module in ranks)
    short = {_leaf(m) for m, rank in other.items() if same[_leaf(m), rank] == total[_leaf(m)]}
    return {(_leaf(m) if _leaf(m) in short else m): rank for m, rank in sorted(other.items())}


def _targets(modules: list[str]) -> list[str]:
    """Return `target_modules`: the usual short names if they mean exactly these layers."""
    blocks = {match[1] for m in modules if (match := re.match(r"model\.layers\.(\d+)\.", m))}
    total = Counter(_leaf(module) for module in modules)
    text_only = all(module.startswith("model.layers.") for module in modules)
    all_blocks = {str(number) for number in range(len(blocks))} == blocks
    if text_only and all_blocks and set(total.values()) == {len(blocks)}:
        return sorted(total)
    return sorted(modules)


def read_peft(folder: Path) -> PeftAdapter:
    """Read an adapter.

    Raises:
        UsageError: it has more than A and B of linear layers (DoRA, biases, full modules, ...).
        StageError: its files are missing or damaged.
    """
    try:
        config = _Config.model_validate_json((folder / PEFT_CONFIG).read_bytes())
    except OSError as error:
        raise StageError(f"{folder / PEFT_CONFIG} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) or "JSON" for item in error.errors())
        raise StageError(f"{folder / PEFT_CONFIG} is not PEFT's: see {fields}") from error
    if (unsupported := config.unsupported()) is not None:
        raise UsageError(
            f"{folder}: an adapter with {unsupported} cannot be loaded, only plain LoRA"
        )
    file = TensorFile(folder / PEFT_WEIGHTS)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in file.shapes:
        match = _KEY.fullmatch(name)
        if match is None:
            raise UsageError(
                f"{folder / PEFT_WEIGHTS}: {name} is not A or B of a linear layer, and cannot be "
                "loaded"
            )
        pairs.setdefault(match[1], {})[match[2]] = file.read(name).astype(np.float32)
    modules = {}
    for module, pair in pairs.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise StageError(f"{folder / PEFT_WEIGHTS}: A and B of {module} do not match")
        modules[module] = LowRankUpdate(a, b, config.scale(module, a.shape[0]))
    if not modules:
        raise StageError(f"{folder / PEFT_WEIGHTS} has no adapter")
    return PeftAdapter(
        base=config.base_model_name_or_path or "",
        revision=config.revision,
        rank=config.r,
        dropout=config.lora_dropout,
        modules=modules,
    )


def uniform_rank(adapter: PeftAdapter) -> PeftAdapter:
    """Pad all layers with zeros to the highest rank; the model stays exactly the same."""
    rank = max(update.rank for update in adapter.modules.values())
    modules = {module: pad_rank(update, rank) for module, update in adapter.modules.items()}
    return replace(adapter, modules=modules)
