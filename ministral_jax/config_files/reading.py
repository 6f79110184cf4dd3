"""From a folder or file to its ModelConfig, with the file named in every error. Knows no key of either layout."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import catalog
from ..config import ModelConfig, Window
from ..errors import ConfigError
from .config_json import config_from_hf
from .json_file import read_json_object
from .layout import CONFIG_FILE_NAMES, Layout, detect_layout
from .params_json import config_from_params

logger = logging.getLogger("ministral_jax")

_READERS: dict[Layout, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "mistral": config_from_params,
    "hf": config_from_hf,
}

# ModelConfig checks that its parts fit each other; its names for them, in the words of the file.
_WORDS: dict[Layout, dict[str, str]] = {
    "mistral": {
        "n_experts": "moe.num_experts",
        "experts_per_token": "moe.num_experts_per_tok",
        "first_dense_layers": "moe.first_k_dense_replace",
        "yarn.beta_fast": "yarn.beta",
        "beta_slow": "alpha",
        "vision hidden size": "vision_encoder.hidden_size",
        "spatial_merge_size": "vision_encoder.spatial_merge_size",
        "patch_merge": "mm_projector_id",
    },
    "hf": {
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "n_experts": "num_local_experts/n_routed_experts",
        "experts_per_token": "num_experts_per_tok",
        "first_dense_layers": "first_k_dense_replace",
        "yarn.beta_fast": "rope_parameters.beta_fast",
        "vision hidden size": "vision_config.hidden_size",
    },
}


def read_config(source: str | Path, *, windows: str | Sequence[Window] | None = None) -> ModelConfig:
    """The config in the folder `source` (its params.json or config.json, by `detect_layout`), or in that very file.

    `windows` replaces the file's, as in `catalog.with_windows`. Raises ConfigError on one line: file, key, what was
    found, what was expected.
    """
    path, layout = _locate(Path(source))
    document = read_json_object(path)
    try:
        config = _READERS[layout](document)
    except ConfigError as problem:
        raise ConfigError(f"{path}: {_in_words_of_the_file(str(problem), layout)}") from None
    if layout == "hf":
        _tell_about_layer_types(path, document)
    if windows is not None:
        return catalog.with_windows(config, windows)
    _tell_about_windows(path, config)
    return config


def _locate(source: Path) -> tuple[Path, Layout]:
    if source.is_file():
        return source, "mistral" if source.name.endswith(CONFIG_FILE_NAMES["mistral"]) else "hf"
    layout = detect_layout(source)
    return source / CONFIG_FILE_NAMES[layout], layout


def _in_words_of_the_file(message: str, layout: Layout) -> str:
    words = _WORDS[layout]
    names = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.sub(rf"(?<![\w.])({names})(?!\w)", lambda found: words[found[1]], message)


def _tell_about_layer_types(path: Path, document: Mapping[str, Any]) -> None:
    text = document["text_config"] if document["model_type"] == "mistral3" else document
    if text.get("model_type") != "ministral" and text.get("layer_types") is not None:
        logger.warning(
            "%s: layer_types is followed, though transformers follows it in model_type 'ministral' only", path
        )


def _tell_about_windows(path: Path, config: ModelConfig) -> None:
    """One line for the published HF config of Ministral 8B, which has a window on layers that were trained without."""
    if catalog.is_ministral_8b_windowed_everywhere(config):
        logger.warning(
            "%s: has a window of %d tokens on every layer, where Ministral 8B was trained with full attention on every "
            "fourth; kept as the file says, the same up to %d tokens; windows='interleaved' (--windows interleaved) "
            "gives the trained pattern",
            path,
            config.windows[0],
            config.windows[0],
        )
