"""Writing safetensors files, one tensor at a time, under a temporary name until complete; in one file or in shards."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..config_files.json_file import write_json
from ..errors import CheckpointError
from .safetensors_header import DTYPE_NAMES, LENGTH_BYTES


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, known before its values are."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Produce = Callable[[str], np.ndarray]


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], produce: Produce, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors of `specs`, asking `produce(name)` for each when its turn comes.

    The file appears under its name only when it is whole and on disk. Raises CheckpointError if it cannot be written.
    """
    # As the safetensors library does, widest elements first, so that each tensor starts at a multiple of its own.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    with _new_file(path) as file:
        file.write(_header(order, specs, metadata))
        for name in order:
            array = produce(name)
            if array.shape != specs[name].shape or array.dtype != specs[name].dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {specs[name]}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_sharded(
    directory: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    produce: Produce,
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `stem.safetensors`, or, if that would pass `max_shard_bytes`, numbered files and then their index.

    Tensors keep the order of `specs`; one larger than the limit gets a file to itself. Returns the weight files.
    """
    shards = _shards(specs, max_shard_bytes)
    if len(shards) == 1:
        path = directory / f"{stem}.safetensors"
        write_safetensors(path, specs, produce, metadata)
        return [path]
    paths = [directory / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, names in zip(paths, shards, strict=True):
        write_safetensors(path, {name: specs[name] for name in names}, produce, metadata)
    weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
    total = sum(spec.n_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{stem}.safetensors.index.json", index)
    return paths


def _shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.n_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.n_bytes
    return shards


def _header(order: list[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        spec = specs[name]
        offsets = [position, position + spec.n_bytes]
        entries[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be written ({problem.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)
