"""The header of a safetensors file: from bytes to tensor descriptions, with every claim checked. Reads no files.

Each claim of a header is suspect. Whatever it says, parsing takes memory in proportion to the header and raises nothing
but CheckpointError, in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

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
# The format's own limit. The next two bound what a hostile header can make of its bytes (lists of empty lists, say).
MAX_HEADER_BYTES = 100_000_000
MAX_ENTRY_CHARACTERS = 4096
MAX_METADATA_CHARACTERS = 4_000_000
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


def shown(name: object) -> str:
    """Something out of a file, safe for a one-line message: quoted, escaped, not much longer than 100 characters."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def parse_header(raw: bytes, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata described by the header `raw` of a file of `size` bytes; `path` is for messages."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise CheckpointError(f"{path}: the header is not UTF-8 at its byte {problem.start}") from None
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    data_start = LENGTH_BYTES + len(raw)
    seen: set[str] = set()
    for name, value in _Entries(text, path):
        if name in seen:
            raise CheckpointError(f"{path}: the header describes {shown(name)} twice")
        seen.add(name)
        if name == "__metadata__":
            metadata = _metadata(value, path)
        else:
            tensors[name] = _tensor_info(name, value, data_start, path)
    _require_gapless(tensors, data_start, size, path)
    return tensors, metadata


class _Refused(ValueError):
    """JSON that Python would take and we do not."""


def _no_constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise _Refused("a key appears twice in one object")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


class _Entries:
    """The pairs of the outermost object one by one, each decoded within a bounded window: nothing large is built."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.at = text, path, 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        if not self.text.startswith("{"):
            raise self._error("does not begin with '{'")
        self.at = 1
        if self._next() != "}":
            yield self._pair()
            while self._next() == ",":
                self.at += 1
                yield self._pair()
            if self._next() != "}":
                raise self._error("neither ',' nor '}' after a description")
        self.at += 1
        if self._next():
            raise self._error("something follows the last '}'")

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: header, character {self.at}: {found}; expected a JSON object of tensor descriptions"
        )

    def _next(self) -> str:
        """The next character that is no blank, without taking it; empty at the end."""
        while (character := self.text[self.at : self.at + 1]) and character in " \t\n\r":
            self.at += 1
        return character

    def _pair(self) -> tuple[str, Any]:
        name = self._value(MAX_ENTRY_CHARACTERS)
        if not isinstance(name, str):
            raise self._error(f"{shown(name)} in place of a name")
        if self._next() != ":":
            raise self._error(f"no ':' after {shown(name)}")
        self.at += 1
        return name, self._value(MAX_METADATA_CHARACTERS if name == "__metadata__" else MAX_ENTRY_CHARACTERS)

    def _value(self, limit: int) -> Any:
        self._next()
        try:
            value, used = _DECODER.raw_decode(self.text[self.at : self.at + limit])
        except json.JSONDecodeError as problem:
            cut = f" (or longer than {limit} characters)" if len(self.text) - self.at > limit else ""
            raise self._error(f"not JSON{cut}: {problem.msg}") from None
        except RecursionError:
            raise self._error("nested too deeply") from None
        except ValueError as problem:  # a refused constant or key, or an integer of thousands of digits
            raise self._error(str(problem)) from None
        self.at += used
        return value


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: __metadata__ is {shown(value)}; expected an object of strings")
    for key, item in value.items():
        if not isinstance(item, str):
            raise CheckpointError(f"{path}: __metadata__[{shown(key)}] is {shown(item)}; expected a string")
    return value


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
