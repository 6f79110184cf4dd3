"""What a run leaves to others in the end: its adapter, or the whole model, in a published layout. No training state."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from ministral_jax.checkpoints.adapters import base_dtype, save_adapter
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.config_files import detect_layout, read_config
from ministral_jax.sharding import hosts
from ministral_jax.stacked import Unstacked
from ministral_jax.tokenizer_files import find_tokenizer_file

from .config import RunConfig
from .step import TrainState, TrainStep


def export(folder: Path, step: TrainStep, state: TrainState, base: Path, config: RunConfig) -> None:
    """Writes the adapter, or the model with its tokenizer file, into `folder`, in the layout and dtype of `base`.

    Every process calls it, the first writes. A folder that is there is written over, file by file.
    """
    to = config.to or detect_layout(base)
    dtype = config.adapter_dtype or base_dtype(base)
    trained = _gathered(state.trained)
    if hosts.process_id() != 0:
        return
    model = step.model(trained, state.frozen, None)
    if config.lora is not None:
        save_adapter(folder, model, to=to, dtype=dtype, base=config.model, config=read_config(base))
        return
    arrays = Unstacked(trained | state.frozen, model.pattern)
    (save_mistral if to == "mistral" else save_hf)(folder, arrays, model.config, dtype=dtype)
    tokenizer = find_tokenizer_file(base)
    shutil.copyfile(tokenizer, folder / tokenizer.name)


def _gathered(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    """Arrays whose every part this process can read."""
    if hosts.n_processes() == 1:
        return arrays
    return {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}
