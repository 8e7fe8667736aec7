"""`adapter.json`: what the files of an adapter are adapters of; read without Keras."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from job.errors import StageError, UsageError

H5 = "adapter.lora.h5"
DESCRIPTION = "adapter.json"


class AdapterLayer(BaseModel):
    """An adapted layer."""

    index: int
    """Its number in the h5 file."""
    path: str
    kernel: list[int]
    """Shape of its kernel."""


class AdapterInfo(BaseModel):
    """`adapter.json`: what `adapter.lora.h5` is an adapter of."""

    format: Literal[1] = 1
    preset: str
    """The model, as the spec names it."""
    revision: str | None
    """Its commit, where it is of the Hub."""
    family: str
    """Class of the KerasHub backbone."""
    rank: int
    alpha: float
    """As trained. In the h5 file the factor is multiplied into B: there alpha is the rank."""
    rslora: bool
    targets: list[str]
    """Names of the layers, for `backbone.enable_lora(rank, targets)` before loading."""
    layers: list[AdapterLayer]
    files: dict[str, str]
    """SHA-256 of the adapter's files, by their paths beside this one."""


def read_info(path: Path) -> AdapterInfo:
    """Read a description.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        return AdapterInfo.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StageError(f"{path} is not the description of an adapter: {error}") from error


def check_model(info: AdapterInfo, preset: str, family: str, where: str) -> None:
    """Raise UsageError unless the adapter is of this model; folders are compared by name."""
    if info.family != family or _base_name(info.preset) != _base_name(preset):
        raise UsageError(
            f"{where}: the adapter is of {info.preset} ({info.family}), and the model is "
            f"{preset} ({family}); use the adapter's model, or an adapter of this one"
        )


def _base_name(preset: str) -> str:
    return preset if "://" in preset else Path(preset).name
