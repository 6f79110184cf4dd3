"""What a run leaves to others in the end: its adapter, or the whole model, in a published layout. No training state."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ministral_jax.checkpoints.adapters import base_dtype, save_adapter
from ministral_jax.checkpoints.load import load_vision
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.config_files import detect_layout, read_config
from ministral_jax.sharding import hosts
from ministral_jax.stacked import Unstacked
from ministral_jax.tokenizer_files import find_tokenizer_file

from .config import RunConfig
from .step import TrainState, TrainStep


def export(folder: Path, step: TrainStep, state: TrainState, base: Path, config: RunConfig) -> None:
    """Writes the adapter, or the model with its tokenizer file, into `folder`, in the layout and dtype of `base`.

    What reads images is not trained, and a model is written with that of `base`. Every process calls it, and the first,
    which needs memory for all that is trained, writes. A folder that is there is written over, file by file.
    """
    to = config.to or detect_layout(base)
    dtype = config.adapter_dtype or base_dtype(base)
    trained = _gathered(state.trained, dtype)
    if hosts.process_id() != 0:
        return
    model = step.model(trained, state.frozen, None)
    if config.lora is not None:
        save_adapter(folder, model, to=to, dtype=dtype, base=config.model, config=read_config(base))
        return
    vision = load_vision(base, dtype=dtype)
    written = dataclasses.replace(model.config, vision=read_config(base).vision if vision else None)
    arrays = Unstacked(trained | state.frozen | vision, model.pattern)
    (save_mistral if to == "mistral" else save_hf)(folder, arrays, written, dtype=dtype)
    tokenizer = find_tokenizer_file(base if config.tokenizer is None else Path(config.tokenizer))
    shutil.copyfile(tokenizer, folder / tokenizer.name)


def _gathered(arrays: Mapping[str, jax.Array], dtype: str) -> dict[str, jax.Array]:
    """Whole arrays as they are written, on process 0; the others take part, and keep nothing."""
    if hosts.n_processes() == 1:
        return dict(arrays)
    found = {}
    for name, array in arrays.items():
        whole = multihost_utils.process_allgather(array.astype(dtype), tiled=True)
        if hosts.process_id() == 0:
            found[name] = whole
    return found
