"""Two factorizations of a low-rank update: of a Keras kernel, and of a linear layer's matrix.

Keras factors a kernel on its last axis: `[..., last] = A [..., rank] @ B [rank, last]`. In
attention that is one A per head and one B that the heads share. PEFT factors the matrix
`[out, in]` of a linear layer: `B [out, rank] @ A [rank, in]`. Keras to PEFT is exact at
rank x heads: the heads' A are stacked, and B is repeated along the diagonal. PEFT to Keras is
exact at the lowest rank at which all heads share one B.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding errors."""


class LowRankUpdate(NamedTuple):
    """The update `scale * b @ a` of a linear layer's matrix `[out, in]`."""

    a: np.ndarray
    """`[rank, in]`, float32."""
    b: np.ndarray
    """`[out, rank]`, float32."""
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, `(out, in)`."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def delta(self) -> np.ndarray:
        """Compute the update, float32 `[out, in]`."""
        delta: np.ndarray = np.float32(self.scale) * (self.b @ self.a)
        return delta


@dataclass(frozen=True)
class LinearMatrix:
    """The matrix `[out, in]` of a linear layer in transformers, which is a Keras kernel."""

    module: str
    """Name of the layer in the transformers model, like `model.layers.0.self_attn.q_proj`."""
    kernel_shape: tuple[int, ...]
    out_axes: tuple[int, ...]
    """Axes of the kernel that make up the matrix's rows, in order."""
    in_axes: tuple[int, ...]
    """Axes of the kernel that make up its columns, in order."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, `(out, in)`."""
        return self._size(self.out_axes), self._size(self.in_axes)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.kernel_shape[axis] for axis in axes)

    def from_kernel(self, kernel: np.ndarray) -> np.ndarray:
        """Return the matrix `[out, in]` of a kernel."""
        return kernel.transpose(self.out_axes + self.in_axes).reshape(self.shape)

    @property
    def _head_axes(self) -> tuple[int, ...]:
        """Axes of the rows that are not factored: Keras has an A for each index along them."""
        return tuple(axis for axis in self.out_axes if axis != len(self.kernel_shape) - 1)

    def matrix_update(self, a: np.ndarray, b: np.ndarray, scale: float) -> LowRankUpdate:
        """Convert a kernel's factors, `a` `[..., rank]` and `b` `[rank, last]`, to the matrix's.

        The rank becomes rank x heads. Nothing is rounded.
        """
        rank, last = b.shape
        heads = self._size(self._head_axes)
        stacked = a.transpose((*self._head_axes, len(self.kernel_shape) - 1, *self.in_axes))
        rows = _on_diagonal(b.T, heads).reshape(
            *(self.kernel_shape[axis] for axis in self._head_axes), last, -1
        )
        axes = (*self._head_axes, len(self.kernel_shape) - 1)
        order = [axes.index(axis) for axis in self.out_axes]
        matrix_b = rows.transpose(*order, len(order)).reshape(self.shape[0], -1)
        return LowRankUpdate(
            np.ascontiguousarray(stacked.reshape(heads * rank, self.shape[1]), np.float32),
            np.ascontiguousarray(matrix_b),
            scale,
        )

    def kernel_factors(self, update: LowRankUpdate) -> tuple[np.ndarray, np.ndarray]:
        """Convert the matrix's factors to the kernel's, at the lowest rank that is exact.

        Returns:
            a: float32 `[..., rank]`, b: float32 `[rank, last]`, both without the scale.
        """
        a, b = _without_padding(update)
        heads, last = self._size(self._head_axes), self.kernel_shape[-1]
        sizes = [self.kernel_shape[axis] for axis in self.out_axes]
        last_axis = self.out_axes.index(len(self.kernel_shape) - 1)
        rows = np.moveaxis(b.reshape(*sizes, -1), last_axis, -2).reshape(heads, last, -1)
        shared = _shared_block(rows)
        if shared is not None:
            return self._unstack(a.reshape(heads, shared.shape[0], -1)), shared
        # Each head has `last` values for each rank of PEFT's. The row space of all heads' values,
        # `[heads * PEFT's rank, last]`, is what the shared B must span.
        values = rows.transpose(0, 2, 1).reshape(-1, last).astype(np.float64)
        left, singular, right = np.linalg.svd(values, full_matrices=False)
        rank = max(1, int(np.count_nonzero(singular > _NEGLIGIBLE * max(singular[0], 1e-30))))
        root = np.sqrt(singular[:rank])
        mixed = (left[:, :rank] * root).reshape(heads, -1, rank)
        per_head = np.einsum("hpr,pi->hri", mixed, a.astype(np.float64))
        return self._unstack(per_head), (root[:, None] * right[:rank]).astype(np.float32)

    def _unstack(self, per_head: np.ndarray) -> np.ndarray:
        """Convert `[heads, rank, in]` to Keras' A, `[..., rank]`."""
        heads = [self.kernel_shape[axis] for axis in self._head_axes]
        inputs = [self.kernel_shape[axis] for axis in self.in_axes]
        unstacked = per_head.reshape(*heads, per_head.shape[1], *inputs)
        axes = (*self._head_axes, len(self.kernel_shape) - 1, *self.in_axes)
        return np.ascontiguousarray(unstacked.transpose(np.argsort(axes)), np.float32)


def _without_padding(update: LowRankUpdate) -> tuple[np.ndarray, np.ndarray]:
    """Drop the ranks at the end that are zero in both A and B."""
    used = np.any(update.a, axis=1) | np.any(update.b, axis=0)
    rank = max(1, int(np.flatnonzero(used).max(initial=0)) + 1)
    return update.a[:rank], update.b[:, :rank]


def _shared_block(rows: np.ndarray) -> np.ndarray | None:
    """Return B `[rank, last]` if `rows` `[heads, last, heads * rank]` repeat it on the diagonal."""
    heads, last, total = rows.shape
    if total % heads:
        return None
    blocks = rows.reshape(heads, last, heads, total // heads)
    first = blocks[0, :, 0, :]
    repeated = np.array_equal(blocks, _on_diagonal(first, heads))
    return np.ascontiguousarray(first.T) if repeated else None


def _on_diagonal(block: np.ndarray, heads: int) -> np.ndarray:
    """Repeat a block `[last, rank]` along the diagonal of `[heads, last, heads, rank]`."""
    last, rank = block.shape
    blocks = np.zeros((heads, last, heads, rank), np.float32)
    for head in range(heads):
        blocks[head, :, head, :] = block
    return blocks


def pad_rank(update: LowRankUpdate, rank: int) -> LowRankUpdate:
    """Raise the rank with zeros; the update stays the same."""
    extra = rank - update.rank
    a = np.pad(update.a, ((0, extra), (0, 0)))
    return LowRankUpdate(a, np.pad(update.b, ((0, 0), (0, extra))), update.scale)
