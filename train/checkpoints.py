"""The state of a training run on disk, by orbax: each device writes and reads its shards, on this mesh or another.

A checkpoint that was not finished is never loaded: orbax writes to a temporary name and renames. What else a run goes
on from (its data's place, its configuration) is not kept here.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ministral_jax.errors import CheckpointError
from ministral_jax.tokenizer_files import one_line

from .step import TrainState


class StateWriter:
    """Writes states while training goes on, one at a time. Every process has one, and they write together."""

    def __init__(self) -> None:
        self._checkpointer = ocp.StandardCheckpointer()
        self._waiting = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._folder: Path | None = None

    def begin(self, folder: Path, state: TrainState) -> None:
        """Begins to write what is trained, its moments, the step and the key to `folder`, which must not exist.

        When it returns, all of it is off the devices, and `state` may be given to the next step; one that is still
        being written is waited for. Frozen parameters are those of the base model, and are not written.
        """
        self.wait()
        if folder.exists():
            raise CheckpointError(f"{folder} exists: expected a new folder for a checkpoint")
        self._folder = folder
        self._checkpointer.save(folder.absolute(), _kept(state))
        self._written = self._waiting.submit(self._checkpointer.wait_until_finished)

    @property
    def idle(self) -> bool:
        """Whether nothing is being written in this process, or what was is on the disk or has failed."""
        return self._written is None or self._written.done()

    def wait(self) -> None:
        """Waits until what was begun is on the disk. Raises CheckpointError saying what kept it from getting there."""
        if self._written is None:
            return
        try:
            self._written.result()
        except Exception as error:  # of the disk, or of what orbax makes of it
            self._written = None
            raise CheckpointError(f"{self._folder}: cannot be written: {one_line(error)}") from error
        self._written = None  # not before: Ctrl-C may end the waiting, not the writing

    def close(self) -> None:
        """Ends its threads, after what is being written."""
        self._waiting.shutdown()
        self._checkpointer.close()


def restore_state(folder: Path, like: TrainState) -> TrainState:
    """The state in `folder`, in the places of `like`: a state of arrays or of their shapes, with arrays as `frozen`.

    The mesh need not be the one it was written on. Raises CheckpointError where the folder is no finished checkpoint,
    or one of other parameters.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no checkpoint there")
    wanted = jax.tree.map(_struct, _kept(like))
    with ocp.StandardCheckpointer() as checkpointer:
        _require_same(folder, checkpointer.metadata(folder.absolute()).item_metadata, wanted)
        found = checkpointer.restore(folder.absolute(), wanted)
    key = jax.random.wrap_key_data(found.pop("key"))
    return TrainState(frozen=like.frozen, key=key, **found)


def _require_same(folder: Path, stored: Any, wanted: Any) -> None:
    """Compares names, shapes and dtypes before anything is read: what orbax breaks off leaves tasks behind."""
    if stored is None:
        raise CheckpointError(f"{folder}: cannot be restored: it is no finished checkpoint")
    there, here = _by_name(stored.tree), _by_name(wanted)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise CheckpointError(
                f"{folder}: cannot be restored as this run's state: {name} is {_shown(there.get(name))} there, "
                f"{_shown(here.get(name))} here"
            )


def _by_name(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of every array of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {_path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _path_name(path: tuple[Any, ...]) -> str:
    """As orbax has it, which keeps tuples as lists and fields by name."""
    return ".".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def _shown(array: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if array is None else f"{array[1]}{list(array[0])}"


def _kept(state: TrainState) -> dict[str, Any]:
    """What is written; keys as their numbers."""
    is_abstract = isinstance(state.key, jax.ShapeDtypeStruct)
    key = jax.eval_shape(jax.random.key_data, state.key) if is_abstract else jax.random.key_data(state.key)
    return {"trained": state.trained, "moments": state.moments, "step": state.step, "key": key}


def _struct(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
