"""Writing safetensors files, one tensor at a time, under a temporary name until complete; in one file or in shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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


# Smaller pieces are summed before another thread would have begun.
SUMMED_ASIDE = 2**18

Produce = Callable[[str], np.ndarray]
# A tensor's bytes in pieces, in order; each stays valid until the next but one is asked for.
Chunks = Callable[[str], Iterable[np.ndarray]]


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], produce: Produce, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the tensors of `specs`, asking `produce(name)` for each when its turn comes.

    The file appears under its name only when it is whole and on disk. Raises CheckpointError if it cannot be written.
    """

    def whole(name: str) -> Iterator[np.ndarray]:
        array = produce(name)
        if array.shape != specs[name].shape or array.dtype != specs[name].dtype:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, announced as {specs[name]}")
        yield np.ascontiguousarray(array)

    with _new_file(path) as file:
        _write(file.write, specs, whole, metadata)


def write_streamed(
    path: Path, specs: Mapping[str, TensorSpec], chunks: Chunks, metadata: Mapping[str, str] | None = None
) -> str:
    """Writes the same file as `write_safetensors` from tensors in pieces; returns the SHA-256 of the file, in hex.

    The sum is taken of one piece while the next is read and written.
    """
    digest = hashlib.sha256()
    with _new_file(path) as file, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(digest.update, b"")

        def write(piece: bytes | memoryview) -> None:
            nonlocal pending
            pending.result()
            if len(piece) < SUMMED_ASIDE:
                digest.update(piece)
            else:
                pending = pool.submit(digest.update, piece)
            file.write(piece)

        _write(write, specs, chunks, metadata)
        pending.result()
    return digest.hexdigest()


def file_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file that these tensors make."""
    return len(_header(_ordered(specs), specs, metadata)) + sum(spec.n_bytes for spec in specs.values())


def _write(
    write: Callable[[bytes | memoryview], object],
    specs: Mapping[str, TensorSpec],
    chunks: Chunks,
    metadata: Mapping[str, str] | None,
) -> None:
    order = _ordered(specs)
    write(_header(order, specs, metadata))
    for name in order:
        n_bytes = 0
        for piece in chunks(name):
            write(piece.reshape(-1).view(np.uint8).data)
            n_bytes += piece.nbytes
        if n_bytes != specs[name].n_bytes:
            raise ValueError(f"{name} has {n_bytes} bytes, announced as {specs[name]}")


def _ordered(specs: Mapping[str, TensorSpec]) -> list[str]:
    # As the safetensors library does, widest elements first, so that each tensor starts at a multiple of its own.
    return sorted(specs, key=lambda name: -specs[name].dtype.itemsize)


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
    shards = shard_names(specs, max_shard_bytes)
    if len(shards) == 1:
        path = directory / f"{stem}.safetensors"
        write_safetensors(path, specs, produce, metadata)
        return [path]
    paths = [directory / name for name in shard_file_names(stem, len(shards))]
    for path, names in zip(paths, shards, strict=True):
        write_safetensors(path, {name: specs[name] for name in names}, produce, metadata)
    index = index_document(specs, {path.name: names for path, names in zip(paths, shards, strict=True)})
    write_json(directory / f"{stem}.safetensors.index.json", index)
    return paths


def index_document(specs: Mapping[str, TensorSpec], files: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """The index of numbered files; `files` are the tensors of each."""
    weight_map = {name: file_name for file_name, names in files.items() for name in names}
    total = sum(spec.n_bytes for spec in specs.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def shard_file_names(stem: str, count: int) -> list[str]:
    """What the files of a checkpoint are called: one alone, or numbered ones."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def shard_names(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Which tensors go into which file, in order: as many as fit, and one that does not fit into a file of its own."""
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
