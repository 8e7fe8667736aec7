"""Safetensors files, one tensor in memory at a time.

The format is the header's length (8 bytes, little-endian), a JSON header, then the tensors' bytes.
The safetensors library's numpy interface does not support bfloat16, which most checkpoints use.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from job.errors import StageError

_FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


_CHUNK = 1 << 24


class Entry(NamedTuple):
    """The position of a tensor in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """A safetensors file, whose header is read at once and whose tensors are read on demand.

    Raises:
        StageError: it is not a safetensors file, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                total = path.stat().st_size
                if not 0 < length <= total - 8:
                    raise ValueError("its header is truncated")
                header = json.loads(file.read(length))
            self.data = 8 + length
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            self.entries = {
                name: Entry(name, value["dtype"], tuple(value["shape"]), begin, end - begin)
                for name, value in tensors.items()
                for begin, end in [value["data_offsets"]]
            }
            if (
                self.data + max((e.start + e.size for e in self.entries.values()), default=0)
                > total
            ):
                raise ValueError("its tensors are truncated")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StageError(f"{path} is not a valid safetensors file: {error}") from error

    def floats(self, name: str) -> np.ndarray:
        """Read a tensor as float32.

        Raises:
            StageError: its dtype is not a floating-point type.
        """
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(self.data + entry.start)
            return self._decode(entry, file.read(entry.size)).astype(np.float32)

    def _decode(self, entry: Entry, content: bytes) -> np.ndarray:
        if entry.dtype not in _FLOATS:
            raise StageError(f"{self.path}: {entry.name} has dtype {entry.dtype}, not a float")
        return np.frombuffer(content, np.dtype(_FLOATS[entry.dtype])).reshape(entry.shape)

    def rewrite(
        self, target: Path, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]
    ) -> None:
        """Copy the file with some tensors changed.

        Args:
            target: the file to write.
            changes: functions of float32 tensors by name; shape and dtype in the file stay.
        """
        with self.path.open("rb") as source, target.open("wb") as file:
            file.write(source.read(self.data))
            position = 0
            for entry in sorted(self.entries.values(), key=lambda entry: entry.start):
                _copy(source, file, entry.start - position)
                if entry.name in changes:
                    before = self._decode(entry, source.read(entry.size))
                    after = changes[entry.name](before.astype(np.float32))
                    file.write(np.ascontiguousarray(after.astype(before.dtype)).tobytes())
                else:
                    _copy(source, file, entry.size)
                position = entry.start + entry.size
            _copy(source, file, None)


def _copy(source: BinaryIO, target: BinaryIO, size: int | None) -> None:
    """Copy the next `size` bytes, or all that remain."""
    while size is None or size > 0:
        part = source.read(_CHUNK if size is None else min(_CHUNK, size))
        if not part:
            return
        target.write(part)
        size = None if size is None else size - len(part)


def save_tensors(target: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file; all tensors are in memory until it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = {np.dtype(kind): name for name, kind in _FLOATS.items()}
    arrays, position = [], 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        arrays.append(tensor)
        position += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while arrays:
            file.write(np.ascontiguousarray(arrays.pop(0)).tobytes())
