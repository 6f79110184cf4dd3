"""The header of a safetensors file: from bytes to tensor descriptions, with every claim checked. Reads no files.

Each claim of a header is suspect. Whatever it says, parsing takes memory in proportion to the header and raises nothing
but CheckpointError, in one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .json_pieces import JsonPieces, shown

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES = 8
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 32


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `begin` counts bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.begin + self.n_bytes


def parse_header(raw: bytes, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata described by the header `raw` of a file of `size` bytes; `path` is for messages."""
    header = JsonPieces(raw, path, "header")
    if not header.text.startswith("{"):
        raise CheckpointError(f"{path}: header begins with {shown(header.text[:1])}; expected '{{'")
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    data_start = LENGTH_BYTES + len(raw)

    def member(name: str) -> Any:
        return dict(header.object(lambda key: header.string())) if name == METADATA else header.value()

    for name, value in header.object(member):
        if name == METADATA:
            metadata = value
        else:
            tensors[name] = _tensor_info(name, value, data_start, path)
    header.end()
    _require_gapless(tensors, data_start, size, path)
    return tensors, metadata


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor_info(name: str, value: Any, data_start: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is described by {shown(value)}; expected an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in value:
            raise CheckpointError(f"{where} has no {key}; expected dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {shown(value['dtype'])}; expected one of {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(
            f"{where} has shape {shown(shape)}; expected a list of at most {MAX_RANK} integers, none negative"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has data_offsets {shown(offsets)}; expected [begin, end] with 0 <= begin <= end"
        )
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        raise CheckpointError(f"{where} has shape {shown(shape)}; expected one that fits a memory")
    info = TensorInfo(dtype, tuple(shape), data_start + offsets[0])
    if info.n_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where} has {shown(offsets[1] - offsets[0])} bytes by its data_offsets; expected {info.n_bytes} "
            f"for shape {shown(shape)} of {value['dtype']}"
        )
    return info


def _require_gapless(tensors: Mapping[str, TensorInfo], data_start: int, size: int, path: Path) -> None:
    """Each byte after the header belongs to exactly one tensor, as the format demands."""
    position, previous = data_start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            problem = "they overlap" if info.begin < position else "the bytes between belong to no tensor"
            raise CheckpointError(
                f"{path}: tensor {shown(name)} begins at byte {shown(info.begin)} of the file, expected {position}, "
                f"where {previous} ends: {problem}"
            )
        position, previous = info.end, shown(name)
        if position > size:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} ends at byte {position}, but the file has only {size} bytes: "
                "truncated; download or copy it again"
            )
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes follow {previous}, the last tensor; expected none")
