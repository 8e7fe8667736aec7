"""Adapters in PEFT's format: a folder with `adapter_model.safetensors` and `adapter_config.json`.

Ranks may differ between layers (`rank_pattern`), since an adapter of Keras becomes one of heads
times its rank where heads share B. The factor of `B @ A` is the same everywhere, so readers that
know one rank and one alpha only, as vLLM did for long, compute the same. Only numpy is needed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from job.adapters.low_rank import Factors, compressed, padded
from job.adapters.safetensors_io import TensorFile
from job.errors import StageError, UsageError

MODEL = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter by the names of the transformers model's layers."""

    base: str
    """Name or path of the model it is of."""
    revision: str | None
    """Commit of that model."""
    rank: int
    """The rank it was trained at."""
    dropout: float
    modules: Mapping[str, Factors]


class _Config(BaseModel):
    """What an `adapter_config.json` says that matters here."""

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
        """The factor of `B @ A` of a layer."""
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def unknown(self) -> str | None:
        """What it has that is more than A and B of linear layers."""
        extras = {
            f"peft_type {self.peft_type}": self.peft_type != "LORA",
            "DoRA": self.use_dora,
            "biases": self.bias != "none" or self.lora_bias,
            "modules_to_save": bool(self.modules_to_save),
            "layer_replication": bool(self.layer_replication),
            "fan_in_fan_out": self.fan_in_fan_out,
        }
        return next((name for name, there in extras.items() if there), None)


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: a key is a pattern for the end of a layer's name; the first that fits counts."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def peft_files(adapter: PeftAdapter) -> dict[str, bytes]:
    """The two files of an adapter; the same adapter gives the same bytes."""
    tensors = {}
    for module, factors in sorted(adapter.modules.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.b
    text = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
    return {
        MODEL: safetensors.numpy.save(tensors, metadata={"format": "pt"}),
        CONFIG: text.encode(),
    }


def _config(adapter: PeftAdapter) -> dict[str, Any]:
    scale = next(iter(adapter.modules.values())).scale
    assert all(math.isclose(f.scale, scale) for f in adapter.modules.values())
    ranks = {module: factors.rank for module, factors in adapter.modules.items()}
    given = set(ranks.values())
    rank = given.pop() if len(given) == 1 else adapter.rank
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
    """`rank_pattern` by the last part of names where its layers are alike, by names elsewhere."""
    alike = Counter((_leaf(module), rank) for module, rank in ranks.items())
    every = Counter(_leaf(module) for module in ranks)
    short = {_leaf(m) for m, rank in other.items() if alike[_leaf(m), rank] == every[_leaf(m)]}
    return {(_leaf(m) if _leaf(m) in short else m): rank for m, rank in sorted(other.items())}


def _targets(modules: list[str]) -> list[str]:
    """`target_modules`: the usual short names where they mean these layers and no others."""
    blocks = {match[1] for m in modules if (match := re.match(r"model\.layers\.(\d+)\.", m))}
    every = Counter(_leaf(module) for module in modules)
    text_only = all(module.startswith("model.layers.") for module in modules)
    whole = {str(number) for number in range(len(blocks))} == blocks
    if text_only and whole and set(every.values()) == {len(blocks)}:
        return sorted(every)
    return sorted(modules)


def read_peft(folder: Path) -> PeftAdapter:
    """Read an adapter.

    Raises:
        UsageError: it is more than A and B of linear layers (DoRA, biases, whole modules, ...).
        StageError: its files are missing or damaged.
    """
    try:
        config = _Config.model_validate_json((folder / CONFIG).read_bytes())
    except OSError as error:
        raise StageError(f"{folder / CONFIG} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) or "JSON" for item in error.errors())
        raise StageError(f"{folder / CONFIG} is not PEFT's: see {fields}") from error
    if (unknown := config.unknown()) is not None:
        raise UsageError(
            f"{folder}: an adapter with {unknown} cannot be taken over, only plain LoRA"
        )
    file = TensorFile(folder / MODEL)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in file.entries:
        match = _KEY.fullmatch(name)
        if match is None:
            raise UsageError(
                f"{folder / MODEL}: {name} is not A or B of a linear layer: it cannot be taken over"
            )
        found.setdefault(match[1], {})[match[2]] = file.floats(name)
    modules = {}
    for module, pair in found.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise StageError(f"{folder / MODEL}: A and B of {module} do not fit together")
        modules[module] = Factors(a, b, config.scale(module, a.shape[0]))
    if not modules:
        raise StageError(f"{folder / MODEL} holds no adapter")
    return PeftAdapter(
        base=config.base_model_name_or_path or "",
        revision=config.revision,
        rank=config.r,
        dropout=config.lora_dropout,
        modules=modules,
    )


def _each(adapter: PeftAdapter, change: Callable[[Factors], Factors]) -> PeftAdapter:
    modules = {module: change(factors) for module, factors in adapter.modules.items()}
    return replace(adapter, modules=modules)


def uniform(adapter: PeftAdapter) -> PeftAdapter:
    """The same adapter, exactly, at one rank: the smaller ones are filled up with zeros."""
    rank = max(factors.rank for factors in adapter.modules.values())
    return _each(adapter, lambda factors: padded(factors, rank))


@dataclass(frozen=True)
class Loss:
    """What compression loses, as shares of the update's Frobenius norm."""

    whole: float
    """Over all layers."""
    worst: float
    module: str
    """The layer that loses the largest share."""


def compress(adapter: PeftAdapter, rank: int) -> tuple[PeftAdapter, Loss]:
    """The nearest adapter of one rank for all layers, and what that loses."""
    modules, lost, norms = {}, {}, {}
    for module, factors in adapter.modules.items():
        modules[module], lost[module], norms[module] = compressed(factors, rank)
    shares = {module: lost[module] / norms[module] if norms[module] else 0.0 for module in lost}
    worst = max(shares, key=lambda module: shares[module])
    total = math.hypot(*norms.values())
    whole = math.hypot(*lost.values()) / total if total else 0.0
    return replace(adapter, modules=modules), Loss(whole, shares[worst], worst)
