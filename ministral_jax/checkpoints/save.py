"""From the arrays of a model to a folder in either published layout. Not conversion, which never holds one whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..config_files import CONFIG_FILE_NAMES, Layout, write_config_json, write_params_json
from ..errors import CheckpointError
from ..row_order import interleaved_rows
from .layouts import (
    HEAD,
    HF_HEADS,
    HF_PREFIXES,
    expert_parts,
    fused_hf_name,
    hf_name,
    is_vision,
    mistral_name,
    mistral_source,
)
from .safetensors_writer import TensorSpec, write_sharded
from .weight_files import STEMS, is_weight_file

# The size that transformers writes by default.
MAX_SHARD_BYTES = 50 * 10**9

Where = tuple[str, int | None]  # a parameter, and which expert of it


def save_mistral(
    directory: str | Path,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `params.json` and `consolidated.safetensors`; `arrays` are those of `parameters.parameters(model)`.

    Queries and keys go back to interleaved rows. `dtype` names another one than the arrays have. Of arrays without
    a vision tower only the text decoder is written, and the config says so. An existing checkpoint is replaced, each
    file when its successor is complete.
    """
    _refuse_adapters(arrays, directory)
    folder = _made(directory)
    parts = {part: where for name in arrays for part, where in _by_expert(name, config).items()}
    sources = {mistral_source(part, config): where for part, where in parts.items()}
    specs = {source.name: _spec(_part(arrays, where), dtype) for source, where in sources.items()}
    named = {source.name: (source.heads, where) for source, where in sources.items()}

    def produce(name: str) -> np.ndarray:
        n_heads, where = named[name]
        rows = np.asarray(_part(arrays, where))
        return (interleaved_rows(rows, n_heads) if n_heads else rows).astype(specs[name].dtype, copy=False)

    written = write_sharded(folder, STEMS["mistral"], specs, produce, max_shard_bytes=max_shard_bytes)
    _remove_others(folder, "mistral", written)
    write_params_json(_described(config, arrays), folder / CONFIG_FILE_NAMES["mistral"])


def save_hf(
    directory: str | Path,
    arrays: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `config.json` and `model.safetensors`, as `save_mistral` does its own files."""
    _refuse_adapters(arrays, directory)
    folder = _made(directory)
    named = _hf_tensors(arrays, config)
    specs = {name: _spec(arrays[where[0][0]], dtype, shape) for name, (shape, where) in named.items()}

    def produce(name: str) -> np.ndarray:
        pieces = [np.asarray(_part(arrays, where)) for where in named[name][1]]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-2)
        return whole.astype(specs[name].dtype, copy=False)

    # transformers refuses a file that does not say which framework's layout it has.
    metadata = {"format": "pt"}
    written = write_sharded(folder, STEMS["hf"], specs, produce, max_shard_bytes=max_shard_bytes, metadata=metadata)
    _remove_others(folder, "hf", written)
    write_config_json(_described(config, arrays), folder / CONFIG_FILE_NAMES["hf"])


def _by_expert(name: str, config: ModelConfig) -> dict[str, Where]:
    """What files call parts of a parameter -> where they are in it."""
    parts = expert_parts(name, config)
    return {part: (name, None if parts == [name] else expert) for expert, part in enumerate(parts)}


def _part(arrays: Mapping[str, Any], where: Where) -> Any:
    name, expert = where
    return arrays[name] if expert is None else arrays[name][expert]


def _hf_tensors(arrays: Mapping[str, Any], config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Sequence[Where]]]:
    """Tensor -> its shape, and what it holds: with latent attention all experts, w3 behind w1."""
    tensors: dict[str, tuple[tuple[int, ...], Sequence[Where]]] = {}
    prefix = HF_PREFIXES[1] if any(map(is_vision, arrays)) else HF_PREFIXES[0]
    for name, array in arrays.items():
        layer, experts, part = name.removesuffix(".weight").partition(".feed_forward.experts.")
        if experts and config.latent:
            (n_experts, rows, columns), fused = array.shape, fused_hf_name(layer, part, prefix)
            whole = [(f"{layer}{experts}{w}.weight", None) for w in (("w2",) if part == "w2" else ("w1", "w3"))]
            tensors[fused] = (n_experts, rows * len(whole), columns), whole
            continue
        for expert_name, where in _by_expert(name, config).items():
            target = HF_HEADS[0] if name == HEAD else hf_name(mistral_name(expert_name, config), prefix)
            tensors[target] = tuple(_part(arrays, where).shape), [where]
    return tensors


def _described(config: ModelConfig, arrays: Mapping[str, Any]) -> ModelConfig:
    return config if any(map(is_vision, arrays)) else dataclasses.replace(config, vision=None)


def _refuse_adapters(arrays: Mapping[str, Any], directory: str | Path) -> None:
    if any(name.endswith((".lora_a", ".lora_b")) for name in arrays):
        raise CheckpointError(
            f"{directory}: the model has an adapter; write it alone with save_adapter and merge the files, or save "
            "without_adapters(model)"
        )


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


def _spec(array: Any, dtype: str | None, shape: tuple[int, ...] | None = None) -> TensorSpec:
    return TensorSpec(np.dtype(jnp.dtype(dtype or array.dtype)), tuple(array.shape) if shape is None else shape)
