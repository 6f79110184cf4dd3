"""Two checkpoints of any layouts, tensor by tensor under canonical names, in memory order and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .canonical import Tensor
from .opening import Checkpoint
from .pieces import Dtype, Pieces, dtype_after


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs. `in_a` and `in_b` say what it is on each side, None where it is not there.

    `different` elements of `elements` differ, by at most `max_abs` (inf where one side alone is not finite); None where
    the shapes differ. Elements of one dtype are compared by their bits, of two dtypes by value.
    """

    name: str
    in_a: str | None
    in_b: str | None
    elements: int | None = None
    different: int | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        if self.in_b is None or self.in_a is None:
            return f"{self.name}: only in {'A' if self.in_b is None else 'B'} ({self.in_a or self.in_b})"
        parts = []
        if self.in_a != self.in_b:
            parts.append(f"{self.in_a} in A, {self.in_b} in B")
        if self.different:
            parts.append(f"{self.different} of {self.elements} elements differ, by at most {self.max_abs:g}")
        return f"{self.name}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Comparison:
    """`tensors` names in all, and how those differ that do."""

    tensors: int
    differences: tuple[TensorDifference, ...]

    @property
    def same(self) -> bool:
        return not self.differences


def compare(
    a: Checkpoint, b: Checkpoint, *, dtype: Dtype | None = None, progress: Callable[[int, int], object] | None = None
) -> Comparison:
    """Compares all tensors; with `dtype`, those of `a` as a conversion to it would have them.

    `progress` is told bytes of `a` done and in all.
    """
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    total, done = sum(tensor.n_bytes for tensor in a.tensors.values()), 0
    pieces = Pieces(a), Pieces(b)
    differences = []
    for name in names:
        difference = _difference(name, (a.tensors.get(name), b.tensors.get(name)), pieces, dtype)
        if difference:
            differences.append(difference)
        if progress and name in a.tensors:
            done += a.tensors[name].n_bytes
            progress(done, total)
    return Comparison(len(names), tuple(differences))


def _difference(
    name: str, pair: tuple[Tensor | None, Tensor | None], pieces: tuple[Pieces, Pieces], dtype: Dtype | None
) -> TensorDifference | None:
    one, other = pair
    if one is None or other is None:
        return TensorDifference(name, one and _described(one, one.dtype), other and _described(other, other.dtype))
    first = dtype_after(one, dtype)
    described = _described(one, first), _described(other, other.dtype)
    if one.shape != other.shape:
        return TensorDifference(name, *described)
    streams = pieces[0].of(one, interleaved=False, dtype=first), pieces[1].of(other, interleaved=False)
    different, largest = 0, 0.0
    for x, y in _side_by_side(*streams):
        count, gap = _count(x, y)
        different, largest = different + count, max(largest, gap)
    if not different and first == other.dtype:
        return None
    return TensorDifference(name, *described, math.prod(one.shape), different, largest)


def _described(tensor: Tensor, dtype: np.dtype) -> str:
    return f"{dtype.name} {list(tensor.shape)}"


def _side_by_side(a: Iterator[np.ndarray], b: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The elements of two sequences of pieces of one total, in pairs of equal length."""
    x = y = np.empty(0)
    while True:
        x = x if x.size else next(a, x)
        y = y if y.size else next(b, y)
        n = min(x.size, y.size)
        if n == 0:
            return
        yield x[:n], y[:n]
        x, y = x[n:], y[n:]


def _count(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """How many elements differ, and by how much at most."""
    if x.dtype == y.dtype:
        integers = f"u{x.dtype.itemsize}"
        unlike = x.view(integers) != y.view(integers)
    else:
        unlike = _unlike_values(x.astype(np.float64), y.astype(np.float64))
    count = int(np.count_nonzero(unlike))
    if not count:
        return 0, 0.0
    one, other = x[unlike].astype(np.float64), y[unlike].astype(np.float64)
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - other)
    gaps[np.isnan(gaps)] = np.inf
    gaps[~_unlike_values(one, other)] = 0.0
    return count, float(gaps.max())


def _unlike_values(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one != other) & ~(np.isnan(one) & np.isnan(other))
