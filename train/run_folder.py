"""The folder of a run: its configuration, metrics and checkpoints, and which of these can be gone on from.

A checkpoint is a folder that gets its name when all in it is on the disk, the state of the training and the place in
the data together, so that the two can never disagree.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ministral_jax.errors import CheckpointError, ConfigError
from ministral_jax.sharding import hosts

from .checkpoints import StateWriter, restore_state
from .config import CheckpointConfig, RunConfig, run_config
from .data.run_file import read_document
from .step import TrainState

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_CHECKPOINTS = "checkpoints"
_STATE, _REST = "state", "run.json"
_PARTIAL, _REMOVED = ".partial", ".removed"
_NAME = re.compile(r"step_([0-9]{6,})")

# What may be otherwise when a run goes on: where files lie, over which devices it runs, when it says and writes what.
_FREE = {
    *("model", "revision", "tokenizer", "run_dir", "mesh", "rules", "remat", "log_every", "eval", "eval_data"),
    *("checkpoints", "samples", "to", "adapter_dtype", "tensorboard", "wandb"),
    "data",  # compared by the data's own state, which knows the content of the files
}


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: after so many steps, with this loss of evaluation if there was one at that step."""

    folder: Path
    step: int
    data: dict[str, Any]
    eval_loss: float | None

    def notes(self) -> str:
        """What stands beside the state."""
        return json.dumps({"step": self.step, "eval_loss": self.eval_loss, "data": self.data})

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Raises CheckpointError for a folder whose notes are damaged."""
        try:
            notes = json.loads((folder / _REST).read_text(encoding="utf-8"))
            return cls(folder, notes["step"], notes["data"], notes["eval_loss"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / _REST}: missing or damaged; remove {folder} to go on earlier") from error

    def restore(self, like: TrainState) -> TrainState:
        """The state, in the places of `like`. Raises CheckpointError if it is another step's than the data's."""
        state = restore_state(self.folder / _STATE, like)
        if int(state.step) != self.step:
            raise CheckpointError(f"{self.folder}: the state is of step {int(state.step)}, its data of {self.step}")
        return state


class RunFolder:
    """The folder of one run. Among several processes all see the same files, and the first alone writes small ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._meetings = 0
        self._writer: StateWriter | None = None
        self._unfinished: Checkpoint | None = None  # one that is being written

    def agreed(self, config: RunConfig, *, resume: bool) -> RunConfig:
        """The configuration to run with: as given, with the batch of the run that goes on. Writes nothing.

        Raises ConfigError where the folder exists without `resume`, is of something else, or its run was configured
        otherwise.
        """
        there, saved = self.path.exists(), self.path / CONFIG_FILE
        if there and not resume:
            raise ConfigError(
                f"run_dir: {self.path} exists; --resume goes on with it, another run needs another folder"
            )
        if saved.exists():
            config = _continued(run_config(read_document(saved)).config, config, saved)
        elif there and any(entry.name not in (_CHECKPOINTS, CONFIG_FILE + _PARTIAL) for entry in self.path.iterdir()):
            raise ConfigError(f"run_dir: {self.path} has no {CONFIG_FILE}, so it is no run to go on with")
        self._meet()  # all have looked before one writes
        return config

    def create(self, config: RunConfig) -> None:
        """Makes the folder, clears away what a killed run has left half written, and writes the configuration."""
        import yaml

        if hosts.process_id() == 0:
            (self.path / _CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            for left_over in (self.path / _CHECKPOINTS).iterdir():
                if left_over.suffix in (_PARTIAL, _REMOVED):
                    shutil.rmtree(left_over)
            _write(self.path / CONFIG_FILE, yaml.safe_dump(config.document(), sort_keys=False))
        self._meet()

    def checkpoints(self) -> list[Checkpoint]:
        """All that are finished, the earliest first."""
        home = self.path / _CHECKPOINTS
        folders = home.iterdir() if home.is_dir() else ()
        found = [Checkpoint.read(folder) for folder in folders if _NAME.fullmatch(folder.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def save(self, state: TrainState, data: dict[str, Any], step: int) -> None:
        """Begins to write a checkpoint, which `finish` completes; `state` may be used up at once.

        One that was begun before has to be finished.
        """
        assert self._unfinished is None, "two checkpoints at a time"
        self._writer = self._writer or StateWriter()
        folder = self.path / _CHECKPOINTS / f"step_{step:06d}"
        self._writer.begin(_partial(folder) / _STATE, state)
        self._unfinished = Checkpoint(folder, step, data, None)

    def evaluated(self, step: int, loss: float) -> None:
        """Notes the loss of evaluation of the checkpoint after `step`, if there is one, being written or finished."""
        if self._unfinished is not None and self._unfinished.step == step:
            self._unfinished = replace(self._unfinished, eval_loss=loss)
        elif hosts.process_id() == 0:
            for checkpoint in self.checkpoints():
                if checkpoint.step == step:
                    _write(checkpoint.folder / _REST, replace(checkpoint, eval_loss=loss).notes())

    def finish(self, config: CheckpointConfig, *, wait: bool) -> None:
        """Gives the checkpoint that was begun its name if all of it is on the disk, and removes those not kept.

        With `wait` it is waited for. Every process calls it, at the same steps.
        """
        if self._unfinished is None or self._writer is None:
            return
        self._meetings += 1
        # The processes finish a state together, so that where one has done so the others do not wait long.
        idle = hosts.shared(f"checkpoint {self._meetings}", str(int(self._writer.idle)))
        if not wait and not int(idle):
            return
        self._writer.wait()
        self._meet()
        checkpoint, self._unfinished = self._unfinished, None
        if hosts.process_id() == 0:
            partial = _partial(checkpoint.folder)
            _write(partial / _REST, checkpoint.notes())
            os.replace(partial, checkpoint.folder)
            _sync_folder(checkpoint.folder.parent)
            self._prune(config)
        self._meet()

    def close(self, config: CheckpointConfig) -> None:
        """Ends what writes in the background. A process by itself finishes a checkpoint that was begun.

        There is one only where something else has gone wrong, which what goes wrong here does not hide.
        """
        try:
            if hosts.n_processes() == 1:
                self.finish(config, wait=True)
        except CheckpointError as error:
            logger.warning("%s", error)
        finally:
            if self._writer is not None:
                self._writer.close()

    def _prune(self, config: CheckpointConfig) -> None:
        """Removes all but the last `keep` checkpoints and, with `best`, the one with the lowest loss of evaluation."""
        found = self.checkpoints()
        kept = {checkpoint.step for checkpoint in found[-config.keep :]}
        evaluated = [(c.eval_loss, c.step) for c in found if c.eval_loss is not None and math.isfinite(c.eval_loss)]
        if config.best and evaluated:
            kept.add(min(evaluated)[1])
        for checkpoint in found:
            if checkpoint.step not in kept:
                removed = checkpoint.folder.with_name(checkpoint.folder.name + _REMOVED)
                os.replace(checkpoint.folder, removed)
                shutil.rmtree(removed)

    def _meet(self) -> None:
        self._meetings += 1
        hosts.sync(f"run folder {self._meetings}")


def _continued(saved: RunConfig, given: RunConfig, where: Path) -> RunConfig:
    """The configuration to go on with: `given`, with the batch of `saved`. Raises ConfigError where they disagree."""
    if given.batch_per_device:
        given = replace(given, batch_size=saved.batch_size, rows_per_mean=saved.rows_per_mean, batch_per_device=False)
    before, now = saved.document(), given.document()
    for key in dict.fromkeys([*before, *now]):
        if key not in _FREE and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {now.get(key)!r}, but {where} of the run to go on with has {before.get(key)!r}; a run with "
                "other values needs another run_dir"
            )
    return given


def _partial(path: Path) -> Path:
    """The name of a file or folder while it is written."""
    return path.with_name(path.name + _PARTIAL)


def _write(path: Path, text: str) -> None:
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(folder: Path) -> None:
    """Puts a renaming on the disk, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
