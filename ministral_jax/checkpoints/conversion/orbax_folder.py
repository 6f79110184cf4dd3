"""Weights as orbax-checkpoint keeps them, in the folder `orbax` beside a config: written and read tensor by tensor.

A tree by the parts of canonical names, rotary rows in memory order, as `ocp.StandardCheckpointer().restore` gives it.
orbax is imported when something is written or opened; it is an optional dependency.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..json_pieces import shown
from ..safetensors_writer import TensorSpec

FOLDER = "orbax"
# What is on its way to disk at one time: small tensors together, as each commit takes 40 ms, or rows of a large one.
GROUP_BYTES = 64 * 2**20
# Chunks are whole rows, and are compressed and decompressed as one; a few are kept for the rows that follow.
CHUNK_BYTES = 8 * 2**20
CACHE_BYTES = 64 * 2**20


def is_orbax(folder: Path) -> bool:
    """Whether the weights of `folder` are in an orbax folder."""
    return (folder / FOLDER / "_CHECKPOINT_METADATA").is_file()


@contextmanager
def _named_errors(path: Path, doing: str) -> Iterator[None]:
    """What orbax and tensorstore raise, of any type, as one line; our own errors pass."""
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as problem:
        raise CheckpointError(
            f"{path}: orbax-checkpoint is not installed ({problem.name}); expected ministral-jax[train]"
        ) from None
    except Exception as problem:
        reason = " ".join(str(problem).split())[:200]
        raise CheckpointError(f"{path}: cannot be {doing} by orbax ({type(problem).__name__}: {reason})") from problem


class OrbaxReader:
    """The tensors of an orbax folder by their dotted names; a run of elements reads the rows it lies in."""

    def __init__(self, folder: Path) -> None:
        self._path = (folder / FOLDER).resolve()
        self._open: tuple[str, Any] | None = None
        self._context: Any = None
        with _named_errors(self._path, "read"):
            import orbax.checkpoint as ocp

            with ocp.PyTreeCheckpointer() as checkpointer:
                metadata: Any = checkpointer.metadata(self._path)
                leaves = dict(_leaves(metadata.item_metadata.tree))
            self.tensors: Mapping[str, TensorSpec] = {
                name: TensorSpec(np.dtype(leaf.dtype), tuple(leaf.shape)) for name, leaf in leaves.items()
            }

    @property
    def paths(self) -> list[Path]:
        return sorted(path for path in self._path.rglob("*") if path.is_file())

    def path_of(self, name: str) -> Path:
        return self._path

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        """Fills `out` with the elements from number `first` on."""
        spec = self.tensors[name]
        row = math.prod(spec.shape[1:])
        begin, end = first // row, -(-(first + out.size) // row)
        with _named_errors(self._path, "read"):
            store = self._store(name)
            values = np.asarray(store[begin:end].read().result() if spec.shape else store.read().result())
        flat = values.reshape(-1)[first - begin * row :][: out.size]
        if flat.size != out.size or flat.dtype != spec.dtype:
            raise CheckpointError(f"{self._path}: tensor {shown(name)} is not what its metadata says; convert it again")
        out[...] = flat.reshape(out.shape)

    def close(self) -> None:
        self._open = None

    def _store(self, name: str) -> Any:
        if self._open is None or self._open[0] != name:
            import tensorstore

            if self._context is None:
                self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
            kvstore = {"driver": "ocdbt", "base": f"file://{self._path}/", "path": f"{name}/"}
            spec = {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": False}
            self._open = name, tensorstore.open(spec, open=True, context=self._context).result()
        return self._open[1]


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), tree


class _Coming:
    """A tensor that is read when orbax comes to write it, a run of rows after the other."""

    def __init__(self, spec: TensorSpec, pieces: Callable[[], Iterator[np.ndarray]]) -> None:
        self.shape, self.dtype, self.nbytes = spec.shape, spec.dtype, spec.n_bytes
        self.ndim, self.size = len(spec.shape), math.prod(spec.shape)
        self._pieces = pieces

    def chunk_rows(self) -> int:
        """Rows of which a chunk is made."""
        return max(1, CHUNK_BYTES * self.shape[0] // self.nbytes)

    def slabs(self) -> Iterator[np.ndarray]:
        """The rows, some whole chunks at a time, each slab in memory of its own."""
        chunk = self.chunk_rows()
        row = self.size // self.shape[0]
        count = max(1, GROUP_BYTES // (chunk * row * self.dtype.itemsize)) * chunk
        slab, filled = np.empty((min(count, self.shape[0]), *self.shape[1:]), self.dtype), 0
        done = 0
        for piece in self._pieces():
            while piece.size:
                fits = min(piece.size, slab.size - filled)
                slab.reshape(-1)[filled : filled + fits] = piece[:fits]
                piece, filled = piece[fits:], filled + fits
                if filled == slab.size:
                    yield slab
                    done += len(slab)
                    slab, filled = np.empty((min(count, self.shape[0] - done), *self.shape[1:]), self.dtype), 0

    def number(self) -> np.ndarray:
        """The tensor, if it has no axes."""
        return next(self._pieces()).copy().reshape(())


def write_orbax(folder: Path, specs: Mapping[str, TensorSpec], pieces: Callable[[str], Iterator[np.ndarray]]) -> None:
    """Writes the tensors of `specs` into `folder/orbax`; `pieces(name)` gives the elements of one, in order.

    They are asked for when those before are on disk. At one time, 64 MiB are in memory, once as they are and again
    compressed (or a single row, if it is larger).
    """
    empty = next((name for name, spec in specs.items() if math.prod(spec.shape) == 0), None)
    if empty is not None:
        raise CheckpointError(f"{folder / FOLDER}: orbax keeps no empty tensor such as {shown(empty)}")
    with _named_errors(folder / FOLDER, "written"):
        import jax
        import orbax.checkpoint as ocp

        class InTurn(ocp.type_handlers.NumpyHandler):
            async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
                args = args or [ocp.SaveArgs()] * len(values)
                for first, last in _groups([value.nbytes for value in values]):
                    for written in await super().serialize(values[first:last], infos[first:last], args[first:last]):
                        await asyncio.to_thread(written.result)
                return []

            async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
                await _write_rows(value, tspec, ts_context)

        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler()), (_Coming, InTurn(deepcopy_host_arrays=False))
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            tree = _tree({name: _Coming(spec, lambda name=name: pieces(name)) for name, spec in specs.items()})
            checkpointer.save((folder / FOLDER).resolve(), ocp.args.PyTreeSave(tree))


def _give_back_freed() -> None:
    """Has glibc return what was freed: its pools of tensorstore's threads grow by 20 MB with each GB written."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def _write_rows(value: _Coming, spec: Any, context: Any) -> None:
    """Writes a tensor as the tensorstore `spec` says, but for its chunks, which are of whole rows."""
    import tensorstore

    if value.shape:
        spec["metadata"]["chunks"] = [min(value.chunk_rows(), value.shape[0]), *value.shape[1:]]
    store = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=context)
    if not value.shape:
        await store.write(value.number())
        return
    first = 0
    for slab in value.slabs():
        await store[first : first + len(slab)].write(slab, can_reference_source_data_indefinitely=True)
        first += len(slab)
        _give_back_freed()


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of as many neighbours as stay within the bytes of a group, or of one that does not."""
    first, used = 0, 0
    for i, size in enumerate(sizes):
        if used and used + size > GROUP_BYTES:
            yield first, i
            first, used = i, 0
        used += size
    if sizes:
        yield first, len(sizes)


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested objects."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
