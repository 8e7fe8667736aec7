"""Safetensors files, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open

from job.adapters.low_rank import LowRankUpdate
from job.errors import StageError

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class TensorFile:
    """A safetensors file, whose tensors are read on demand.

    Raises:
        StageError: it is missing, truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise StageError(f"{path} is not a valid safetensors file: {error}") from error

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        names: list[str] = self._file.keys()
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def read(self, name: str) -> np.ndarray:
        """Read a tensor.

        Raises:
            StageError: its dtype is not a floating-point type.
        """
        tensor: np.ndarray = self._file.get_tensor(name)
        if tensor.dtype.name not in _FLOATS:
            raise StageError(f"{self.path}: {name} has dtype {tensor.dtype}, not a float")
        return tensor

    def rewrite(self, target: Path, updates: Mapping[str, LowRankUpdate]) -> None:
        """Copy the file with updates added to some tensors; shapes and dtypes stay.

        Args:
            target: the file to write.
            updates: by the names of tensors; those that are not in this file are ignored.
        """
        shutil.copyfile(self.path, target)
        with target.open("r+b") as file:
            # The format: the header's length (8 bytes, little-endian), a JSON header, the tensors.
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            for name in updates.keys() & self.shapes.keys():
                before = self.read(name)
                after = (before.astype(np.float32) + updates[name].delta()).astype(before.dtype)
                file.seek(8 + length + header[name]["data_offsets"][0])
                file.write(np.ascontiguousarray(after).tobytes())
