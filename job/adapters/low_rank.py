"""The two ways to write a low-rank update: of a Keras kernel, and of a linear layer's matrix.

Keras factors a kernel on its last axis: `[..., last] = A [..., rank] @ B [rank, last]`. For
attention that is an A for each head and one B that the heads share. PEFT factors the matrix
`[out, in]` of a linear layer: `B [out, rank] @ A [rank, in]`. Going there is exact, by stacking
the heads' A and setting B along the diagonal, at heads times the rank; coming back is exact
wherever the heads share what Keras wants shared.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding."""


class Factors(NamedTuple):
    """The update `scale * b @ a` of a matrix `[out, in]`."""

    a: np.ndarray
    """`[rank, in]`, float32."""
    b: np.ndarray
    """`[out, rank]`, float32."""
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def delta(self) -> np.ndarray:
        """The update itself, float32 `[out, in]`."""
        delta: np.ndarray = np.float32(self.scale) * (self.b @ self.a)
        return delta


@dataclass(frozen=True)
class Matrix:
    """A kernel of Keras as the matrix `[out, in]` of a transformers model's linear layer."""

    module: str
    """The layer's name in the transformers model, like `model.layers.0.self_attn.q_proj`."""
    kernel_shape: tuple[int, ...]
    out_axes: tuple[int, ...]
    """Axes of the kernel that make up the rows, in order."""
    in_axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self._size(self.out_axes), self._size(self.in_axes)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.kernel_shape[axis] for axis in axes)

    def of_kernel(self, kernel: np.ndarray) -> np.ndarray:
        """The matrix `[out, in]` of a kernel."""
        return kernel.transpose(self.out_axes + self.in_axes).reshape(self.shape)

    @property
    def _heads(self) -> tuple[int, ...]:
        """Axes of the rows that are not factored: those that have an A each."""
        return tuple(axis for axis in self.out_axes if axis != len(self.kernel_shape) - 1)

    def to_matrix(self, a: np.ndarray, b: np.ndarray, scale: float) -> Factors:
        """Factors of the matrix for those of the kernel: `a` `[..., rank]`, `b` `[rank, last]`.

        The rank becomes heads times the rank. Nothing is rounded.
        """
        rank, last = b.shape
        heads = self._size(self._heads)
        stacked = a.transpose((*self._heads, len(self.kernel_shape) - 1, *self.in_axes))
        blocks = np.zeros((heads, last, heads, rank), np.float32)
        for head in range(heads):
            blocks[head, :, head, :] = b.T
        rows = blocks.reshape(*(self.kernel_shape[axis] for axis in self._heads), last, -1)
        order = [(*self._heads, len(self.kernel_shape) - 1).index(axis) for axis in self.out_axes]
        whole = rows.transpose(*order, len(order)).reshape(self.shape[0], -1)
        return Factors(
            np.ascontiguousarray(stacked.reshape(heads * rank, self.shape[1]), np.float32),
            np.ascontiguousarray(whole),
            scale,
        )

    def to_kernel(self, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
        """Factors of the kernel for those of the matrix, at the least rank that is exact.

        Returns:
            a: float32 `[..., rank]`, b: float32 `[rank, last]`; the scale stays beside them.
        """
        a, b = _without_padding(factors)
        heads, last = self._size(self._heads), self.kernel_shape[-1]
        sizes = [self.kernel_shape[axis] for axis in self.out_axes]
        place = self.out_axes.index(len(self.kernel_shape) - 1)
        rows = np.moveaxis(b.reshape(*sizes, -1), place, -2).reshape(heads, last, -1)
        shared = _shared_block(rows)
        if shared is not None:
            return self._unstack(a.reshape(heads, shared.shape[0], -1)), shared
        # Each head's rows are `last` values for each rank of PEFT's; the heads' lists of them,
        # one below the other, are a matrix whose row space is what all heads must share.
        lists = rows.transpose(0, 2, 1).reshape(-1, last).astype(np.float64)
        left, sizes_, right = np.linalg.svd(lists, full_matrices=False)
        rank = max(1, int(np.count_nonzero(sizes_ > _NEGLIGIBLE * max(sizes_[0], 1e-30))))
        root = np.sqrt(sizes_[:rank])
        mixed = (left[:, :rank] * root).reshape(heads, -1, rank)
        per_head = np.einsum("hpr,pi->hri", mixed, a.astype(np.float64))
        return self._unstack(per_head), (root[:, None] * right[:rank]).astype(np.float32)

    def _unstack(self, per_head: np.ndarray) -> np.ndarray:
        """`[heads, rank, in]` to Keras' A, `[..., rank]`."""
        heads = [self.kernel_shape[axis] for axis in self._heads]
        inputs = [self.kernel_shape[axis] for axis in self.in_axes]
        whole = per_head.reshape(*heads, per_head.shape[1], *inputs)
        given = (*self._heads, len(self.kernel_shape) - 1, *self.in_axes)
        return np.ascontiguousarray(whole.transpose(np.argsort(given)), np.float32)


def _without_padding(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """A and B without the ranks at the end that are zero in both."""
    used = np.any(factors.a, axis=1) | np.any(factors.b, axis=0)
    rank = max(1, int(np.flatnonzero(used).max(initial=0)) + 1)
    return factors.a[:rank], factors.b[:, :rank]


def _shared_block(rows: np.ndarray) -> np.ndarray | None:
    """B `[rank, last]` of rows `[heads, last, heads * rank]` that hold it along the diagonal."""
    heads, last, total = rows.shape
    if total % heads:
        return None
    blocks = rows.reshape(heads, last, heads, total // heads)
    first = blocks[0, :, 0, :]
    expected = np.zeros_like(blocks)
    for head in range(heads):
        expected[head, :, head, :] = first
    return np.ascontiguousarray(first.T) if np.array_equal(blocks, expected) else None


def padded(factors: Factors, rank: int) -> Factors:
    """The same update at a higher rank, with zeros."""
    extra = rank - factors.rank
    a = np.pad(factors.a, ((0, extra), (0, 0)))
    return Factors(a, np.pad(factors.b, ((0, 0), (0, extra))), factors.scale)


def compressed(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest update of a lower rank (Eckart and Young 1936), at scale 1.

    Returns:
        The factors, the Frobenius norm of what is lost, and that of the whole update.
    """
    outer, r_b = np.linalg.qr(factors.b.astype(np.float64) * factors.scale)
    inner, r_a = np.linalg.qr(factors.a.T.astype(np.float64))
    left, sizes, right = np.linalg.svd(r_b @ r_a.T)
    kept = min(rank, len(sizes))
    root = np.sqrt(sizes[:kept])
    a = (root[:, None] * right[:kept]) @ inner.T
    b = outer @ (left[:, :kept] * root)
    lost, whole = np.linalg.norm(sizes[kept:]), np.linalg.norm(sizes)
    nearest = Factors(a.astype(np.float32), b.astype(np.float32), 1.0)
    return padded(nearest, rank), float(lost), float(whole)
