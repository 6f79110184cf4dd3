"""From the arrays of a model to a folder in either published layout. Not conversion, which never holds one whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..config_files import CONFIG_FILE_NAMES, Layout, write_config_json, write_params_json
from ..row_order import interleaved_rows
from .layouts import HEAD, HF_HEADS, hf_name, mistral_source
from .safetensors_writer import TensorSpec, write_sharded
from .weight_files import STEMS, is_weight_file

# The size that transformers writes by default.
MAX_SHARD_BYTES = 50 * 10**9


def save_mistral(
    directory: str | Path,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `params.json` and `consolidated.safetensors`; `arrays` are those of `parameters.parameters(model)`.

    Queries and keys go back to interleaved rows. `dtype` names another one than the arrays have. Only the text decoder
    is written, and the config says so. An existing checkpoint is replaced, each file when its successor is complete.
    """
    folder = _made(directory)
    heads = {name: mistral_source(name, config).heads for name in arrays}

    def produce(name: str) -> np.ndarray:
        rows = np.asarray(arrays[name])
        n_heads = heads[name]
        return (interleaved_rows(rows, n_heads) if n_heads else rows).astype(specs[name].dtype, copy=False)

    specs = {name: _spec(array, dtype) for name, array in arrays.items()}
    written = write_sharded(folder, STEMS["mistral"], specs, produce, max_shard_bytes=max_shard_bytes)
    _remove_others(folder, "mistral", written)
    write_params_json(dataclasses.replace(config, vision=None), folder / CONFIG_FILE_NAMES["mistral"])


def save_hf(
    directory: str | Path,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `config.json` and `model.safetensors`, as `save_mistral` does its own files."""
    folder = _made(directory)
    parameter_of = {HF_HEADS[0] if name == HEAD else hf_name(name): name for name in arrays}

    def produce(name: str) -> np.ndarray:
        return np.asarray(arrays[parameter_of[name]]).astype(specs[name].dtype, copy=False)

    specs = {name: _spec(arrays[parameter], dtype) for name, parameter in parameter_of.items()}
    # transformers refuses a file that does not say which framework's layout it has.
    metadata = {"format": "pt"}
    written = write_sharded(folder, STEMS["hf"], specs, produce, max_shard_bytes=max_shard_bytes, metadata=metadata)
    _remove_others(folder, "hf", written)
    write_config_json(dataclasses.replace(config, vision=None), folder / CONFIG_FILE_NAMES["hf"])


def _made(directory: str | Path) -> Path:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_others(folder: Path, layout: Layout, written: list[Path]) -> None:
    """Weight files of the checkpoint that was here before, which a reader might prefer."""
    stem = STEMS[layout]
    keep = {path.name for path in written} | ({f"{stem}.safetensors.index.json"} if len(written) > 1 else set())
    for path in folder.glob(f"{stem}*.safetensors*"):
        if is_weight_file(path.name, layout) and path.name not in keep:
            path.unlink()


def _spec(array: Any, dtype: str | None) -> TensorSpec:
    return TensorSpec(np.dtype(jnp.dtype(dtype or array.dtype)), tuple(array.shape))
