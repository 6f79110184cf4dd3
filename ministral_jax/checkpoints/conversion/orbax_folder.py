"""Weights as orbax-checkpoint keeps them, in the folder `orbax` beside a config: written and read tensor by tensor.

A tree by the parts of canonical names, rotary rows in memory order, as `ocp.StandardCheckpointer().restore` gives it.
orbax is imported when something is written or opened; it is an optional dependency.
"""

from __future__ import annotations

import asyncio
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
# Tensors are committed to disk together up to this size: a small one takes 40 ms alone.
GROUP_BYTES = 64 * 2**20
# orbax compresses, and decompresses, whole chunks; those of a few rows are kept for the rows that follow.
CHUNK_BYTES = 8 * 2**20
CACHE_BYTES = 128 * 2**20


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
    """A tensor that is made when orbax comes to write it."""

    def __init__(self, spec: TensorSpec, make: Callable[[], np.ndarray]) -> None:
        self.shape, self.dtype, self.make = spec.shape, spec.dtype, make
        self.ndim, self.size, self.nbytes = len(spec.shape), math.prod(spec.shape), spec.n_bytes


def write_orbax(folder: Path, specs: Mapping[str, TensorSpec], make: Callable[[str], np.ndarray]) -> None:
    """Writes the tensors of `specs` into `folder/orbax`, asking `make(name)` for each when those before are on disk.

    In memory are, at one time, one tensor or several of 64 MiB together.
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
                    await self._write(values[first:last], infos[first:last], args[first:last])
                return []

            async def _write(self, values: Any, infos: Any, args: Any) -> None:
                for written in await super().serialize([value.make() for value in values], infos, args):
                    await asyncio.to_thread(written.result)

        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler()), (_Coming, InTurn(deepcopy_host_arrays=False))
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            tree = _tree({name: _Coming(spec, lambda name=name: make(name)) for name, spec in specs.items()})
            in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            checkpointer.save((folder / FOLDER).resolve(), ocp.args.PyTreeSave(tree, save_args=in_chunks))


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
