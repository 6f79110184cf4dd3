"""Reading one safetensors file: whole tensors, or slices of them, in memory of their own.

Nothing is mapped: a file that is truncated, replaced or deleted later changes nothing that was read. The header is
parsed in safetensors_header; which files make up a checkpoint is the business of weight_files.
"""

from __future__ import annotations

import io
import math
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import CheckpointError
from .json_pieces import shown
from .safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorInfo, parse_header

# jax on CPU takes host memory over, without a copy, when it starts at a multiple of this.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that nothing else refers to, aligned for jax to take it over."""
    n_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


class SafetensorsFile:
    """An open file: `tensors` by name, `metadata`, and reads. A context manager.

    Raises CheckpointError, in one line that names the file and the tensor, for anything that is not as the format has
    it, be the file damaged or hostile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file = open_regular(self.path)
        try:
            raw, size = _header_bytes(self._file, self.path)
            self.tensors, self.metadata = parse_header(raw, size, self.path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in fresh memory."""
        info = self.tensors[name]
        out = aligned_empty(info.shape, info.dtype)
        self.read_into(name, 0, out)
        return out

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous, with the bytes of the tensor from its element number `first` on."""
        info = self.tensors[name]
        self._read_bytes(name, info.begin + first * info.dtype.itemsize, out)

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """`tensor[index]` for slices of step 1, one per axis, in fresh memory; reads only the bytes of the slice."""
        info = self.tensors[name]
        starts = [part.indices(size)[0] for part, size in zip(index, info.shape, strict=True)]
        stops = [part.indices(size)[1] for part, size in zip(index, info.shape, strict=True)]
        shape = tuple(max(stop - start, 0) for start, stop in zip(starts, stops, strict=True))
        out = aligned_empty(shape, info.dtype)
        if out.size == 0:
            return out
        strides = _byte_strides(info)
        # Axes after the last one that is cut are taken whole, so each index before it is one run of bytes.
        last_cut = max((axis for axis, size in enumerate(shape) if size != info.shape[axis]), default=0)
        for place in np.ndindex(shape[:last_cut]):
            corner = [start + i for start, i in zip(starts, place, strict=False)] + starts[last_cut:]
            offset = sum(i * stride for i, stride in zip(corner, strides, strict=True))
            self._read_bytes(name, info.begin + offset, out[(*place, ...)])
        return out

    def _read_bytes(self, name: str, begin: int, out: np.ndarray) -> None:
        target = out.reshape(-1).view(np.uint8).data
        done = 0
        try:
            with self._lock:
                self._file.seek(begin)
                # One system call reads at most 2 GB.
                while done < len(target) and (count := self._file.readinto(target[done:])):
                    done += count
        except OSError as problem:
            raise CheckpointError(f"{self.path}: reading tensor {shown(name)} failed ({problem.strerror})") from None
        if done < len(target):
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} ends after {done} of its {len(target)} bytes: the file was "
                "changed while it was read; load it again once it is whole"
            )


def _byte_strides(info: TensorInfo) -> list[int]:
    return [math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize for axis in range(len(info.shape))]


def open_regular(path: Path) -> io.FileIO:
    """The file at `path`, if it is one that ends."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, a device never end
            raise CheckpointError(f"{path}: not a regular file; expected a file of weights or their index")
        return io.FileIO(path, "rb")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected one of weights or their index") from None
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be opened ({problem.strerror})") from None


def read_up_to(file: io.FileIO, count: int) -> bytes:
    """The next `count` bytes, or those that there are."""
    pieces = bytearray()
    while len(pieces) < count and (piece := file.read(count - len(pieces))):
        pieces += piece
    return bytes(pieces)


def _header_bytes(file: io.FileIO, path: Path) -> tuple[bytes, int]:
    """The header and the size of the whole file."""
    try:
        size = os.fstat(file.fileno()).st_size
        prefix = read_up_to(file, LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        expected = None
        if len(prefix) < LENGTH_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; copy it again")
        if length > MAX_HEADER_BYTES:
            expected = f"at most {MAX_HEADER_BYTES}"
        elif LENGTH_BYTES + length > size:
            expected = f"at most {size - LENGTH_BYTES} in a file of {size} bytes"
        if expected:
            raise CheckpointError(
                f"{path}: its first 8 bytes announce a header of {length} bytes, expected {expected}: damaged, "
                "truncated, or not a safetensors file"
            )
        return read_up_to(file, length), size
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read ({problem.strerror})") from None
