"""An adapter file is data of its own: it names no other file, and holds what it claims."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from job.adapters.keras_format import load_layers
from job.adapters.safetensors_io import TensorFile
from job.errors import StageError

RANK = 2
KERNELS = {3: (4, 2, 6)}
SHAPES = {"lora_kernel_a": (4, 2, RANK), "lora_kernel_b": (RANK, 6)}
A = "lora/3/vars/lora_kernel_a"


def write_adapter(path: Path, change: Callable[[h5py.File, Path], None] | None = None) -> Path:
    """Write an adapter of ones, then change it; `secret.bin` beside it has numbers of others."""
    secret = path.with_name("secret.bin")
    np.full((4, 2, RANK), 7, np.float32).tofile(secret)
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = RANK
        for name, shape in SHAPES.items():
            file[f"lora/3/vars/{name}"] = np.ones(shape, np.float32)
        if change is not None:
            change(file, secret)
    return path


def external(file: h5py.File, secret: Path) -> None:
    del file[A]
    file.create_dataset(A, SHAPES["lora_kernel_a"], "f4", external=[(str(secret), 0, 64)])


def virtual(file: h5py.File, secret: Path) -> None:
    del file[A]
    layout = h5py.VirtualLayout(SHAPES["lora_kernel_a"], "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", SHAPES["lora_kernel_a"])
    file.create_virtual_dataset(A, layout)


def external_link(file: h5py.File, secret: Path) -> None:
    del file[A]
    file[A] = h5py.ExternalLink(str(secret), "x")


def soft_link(file: h5py.File, secret: Path) -> None:
    file["elsewhere"] = np.ones(SHAPES["lora_kernel_a"], np.float32)
    del file[A]
    file[A] = h5py.SoftLink("/elsewhere")


def link_in_the_path(file: h5py.File, secret: Path) -> None:
    file.move("lora/3", "elsewhere")
    file["lora/3"] = h5py.SoftLink("/elsewhere")


def claims_more(file: h5py.File, secret: Path) -> None:
    del file[A]
    file.create_dataset(A, SHAPES["lora_kernel_a"], "f4", chunks=(4, 2, 1), fillvalue=5)


def texts(file: h5py.File, secret: Path) -> None:
    del file[A]
    file[A] = np.full(SHAPES["lora_kernel_a"], b"x", "S4")


def is_a_group(file: h5py.File, secret: Path) -> None:
    del file[A]
    file.create_group(A)


@pytest.mark.parametrize(
    "change",
    [external, virtual, external_link, soft_link, link_in_the_path, claims_more, texts, is_a_group],
)
def test_what_the_file_does_not_hold_is_not_read(
    change: Callable[[h5py.File, Path], None], tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "adapter.lora.h5", change)
    with pytest.raises(StageError, match=r"adapter\.lora\.h5"):
        load_layers(path, RANK, KERNELS)
    assert load_layers(write_adapter(tmp_path / "good.h5"), RANK, KERNELS)[3][0].sum() == 16


def test_a_claimed_shape_is_refused_before_it_is_read(tmp_path: Path) -> None:
    def large(file: h5py.File, secret: Path) -> None:
        del file[A]
        file.create_dataset(A, (100_000, 50_000, RANK), "f4", chunks=(1000, 1000, 1))

    path = write_adapter(tmp_path / "adapter.lora.h5", large)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(StageError, match="has shape"):
        load_layers(path, RANK, KERNELS)
    with pytest.raises(StageError, match="not stored in the file itself"):  # 37 GiB
        load_layers(path, RANK, {3: (100_000, 50_000, 6)})


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}',
        b'{"a": {"dtype": "F32", "shape": [9999999999], "data_offsets": [0, 8]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=["negative", "overlapping", "too long", "larger than its bytes", "deep", "not text"],
)
def test_headers_that_lie_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(StageError, match="not a valid safetensors file"):
        TensorFile(path)
