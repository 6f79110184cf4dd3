"""A canonical tensor as a sequence of small pieces: read, its rows reordered, cast. Never a whole model, rarely a whole
tensor; writes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal

import ml_dtypes
import numpy as np

from ...errors import CheckpointError
from ...row_order import half_split_rows, interleaved_rows
from .canonical import LORA_LEAVES, Tensor
from .opening import Checkpoint

# Small enough for a piece to stay in the processor's cache while it is read, summed and written.
CHUNK_BYTES = 2 * 2**20

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: Mapping[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_DENSE = (*DTYPES.values(), np.dtype(np.float64))
_CAST_LEAVES = ("weight", "bias", *LORA_LEAVES)


def dtype_after(tensor: Tensor, dtype: Dtype | None) -> np.dtype:
    """What a tensor is stored as when `dtype` is asked for: dense weights change, scales and quantised ones never."""
    if dtype is None or tensor.dtype not in _DENSE or tensor.name.leaf not in _CAST_LEAVES:
        return tensor.dtype
    return DTYPES[dtype]


def dense_dtype(source: Checkpoint) -> np.dtype:
    """What most bytes of the dense floating-point weights are stored as; bfloat16 where there are none."""
    sizes = Counter[np.dtype]()
    for tensor in source.tensors.values():
        if tensor.dtype in DTYPES.values() and tensor.name.leaf == "weight":
            sizes[tensor.dtype] += tensor.n_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=DTYPES["bfloat16"])


class Pieces:
    """Reads the tensors of `source` through two buffers that take turns.

    A piece stays valid until the next but one is asked for, so that one can be summed while the next is read.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._buffers = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(2)]

    def of(self, tensor: Tensor, *, interleaved: bool, dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The elements of `tensor` in order, one axis, as `dtype` (default: its own).

        Rotary rows come `interleaved` (the mistral layout's order) or half-split (all others'). Raises CheckpointError
        where a value does not fit `dtype`.
        """
        reordered = tensor.heads is not None and interleaved != self._source.interleaved
        total = math.prod(tensor.shape)
        if total == 0:
            return
        step = self._step(tensor, total) if reordered else max(1, CHUNK_BYTES // tensor.dtype.itemsize)
        for first in range(0, total, step):
            piece = self._read(tensor, first, min(step, total - first))
            if reordered:
                piece = _reordered(piece, tensor, interleaved=interleaved)
            yield piece if dtype is None or dtype == tensor.dtype else self._cast(piece, dtype, tensor)

    def whole(self, tensor: Tensor, *, interleaved: bool) -> np.ndarray:
        """All of `tensor` in float32, in memory of its own."""
        whole, at = np.empty(tensor.shape, np.float32), 0
        flat = whole.reshape(-1)
        for piece in self.of(tensor, interleaved=interleaved):
            flat[at : at + piece.size] = piece
            at += piece.size
        return whole

    def _step(self, tensor: Tensor, total: int) -> int:
        """Elements of as many whole heads as fit a buffer, at least one."""
        assert tensor.heads is not None
        head = total // tensor.heads
        return max(1, CHUNK_BYTES // (head * tensor.dtype.itemsize)) * head

    def _read(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        n_bytes = count * tensor.dtype.itemsize
        self._buffers.reverse()
        buffer = self._buffers[0] if n_bytes <= CHUNK_BYTES else np.empty(n_bytes, np.uint8)
        piece = buffer[:n_bytes].view(tensor.dtype)
        self._source.reader.read_into(tensor.stored, tensor.first + first, piece)
        return piece

    def _cast(self, piece: np.ndarray, dtype: np.dtype, tensor: Tensor) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = piece.astype(dtype)
        if np.count_nonzero(np.isfinite(cast)) != np.count_nonzero(np.isfinite(piece)):
            path = self._source.reader.path_of(tensor.stored)
            raise CheckpointError(
                f"{path}: tensor '{tensor.stored}' has values beyond {dtype.name}; expected another --dtype"
            )
        return cast


def _reordered(piece: np.ndarray, tensor: Tensor, *, interleaved: bool) -> np.ndarray:
    """The rows of whole heads in the other order, moved as the widest integers that divide a row."""
    assert tensor.heads is not None
    rows = tensor.shape[0]
    row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    width = next(width for width in (8, 4, 2, 1) if row_bytes % width == 0)
    n_rows = piece.nbytes // row_bytes
    integers = piece.view(f"u{width}").reshape(n_rows, row_bytes // width)
    move = interleaved_rows if interleaved else half_split_rows
    return move(integers, n_rows // (rows // tensor.heads)).reshape(-1).view(tensor.dtype)
