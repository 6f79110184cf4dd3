"""LoRA adapters as files: mistral-finetune's lora.safetensors and PEFT's folder. Their settings, not their tensors.

mistral: `output = W x + scaling B A x`, with `lora: {rank, scaling}` in params.json. PEFT: the factor is
`lora_alpha / r`, or over the root of r, by adapter_config.json. Nothing is computed beyond that factor.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config_files.fields import Fields
from ...config_files.json_file import read_json_object
from ...errors import CheckpointError, ConfigError

logger = logging.getLogger("ministral_jax")

MISTRAL_FILE, PEFT_FILE, PEFT_CONFIG = "lora.safetensors", "adapter_model.safetensors", "adapter_config.json"

# What mistral-inference multiplies by when it is not told.
DEFAULT_SCALING = 2.0

# Settings of PEFT under which an adapter is more than B A, or other than one product per module.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "target_parameters",
    "use_qalora",
    "trainable_token_indices",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
)


@dataclass(frozen=True)
class AdapterSettings:
    """Rank, the factor that B A is multiplied by, dropout in training, and the base model's name if it is known."""

    rank: int
    scaling: float
    dropout: float = 0.0
    base: str | None = None


def is_peft(folder: Path) -> bool:
    return (folder / PEFT_CONFIG).is_file()


def is_mistral_adapter(folder: Path) -> bool:
    """Whether `folder` has an adapter of mistral-finetune and no model beside it."""
    return (folder / MISTRAL_FILE).is_file() and not any(folder.glob("consolidated*.safetensors"))


def read_peft(folder: Path) -> tuple[AdapterSettings, dict[str, Any]]:
    """Settings and document of `adapter_config.json`. Raises ConfigError for an adapter that is more than B A."""
    path = folder / PEFT_CONFIG
    document = read_json_object(path)
    try:
        return settings_of_peft(document), document
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


def settings_of_peft(document: Mapping[str, Any]) -> AdapterSettings:
    """Settings of a parsed adapter_config.json. Raises ConfigError naming the key."""
    fields = Fields(document)
    fields.choice("peft_type", ("LORA",))
    fields.choice("bias", ("none",), "none")
    for key in _UNSUPPORTED:
        if document.get(key):
            raise fields.error(key, "none: only plain LoRA, of one rank and one factor, can be converted")
    rank = fields.integer("r", 8)
    alpha = fields.number("lora_alpha", 8.0)
    rooted = fields.boolean("use_rslora", False)
    base = document.get("base_model_name_or_path")
    return AdapterSettings(
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if rooted else rank),
        dropout=_dropout(fields, "lora_dropout"),
        base=base if isinstance(base, str) else None,
    )


def _dropout(fields: Fields, key: str) -> float:
    return fields.number(key, 0.0, above_minimum=False, maximum=1.0)


def settings_of_params(
    path: Path, document: Mapping[str, Any], metadata: Mapping[str, str], rank: int
) -> AdapterSettings:
    """Settings of a mistral adapter: the block `lora` of the params.json at `path`, else the file's own `metadata`.

    `rank` is what its tensors have.
    """
    block = document.get("lora")
    try:
        if isinstance(block, dict):
            fields = Fields(block, "lora")
            scaling = fields.number("scaling", DEFAULT_SCALING)
            return AdapterSettings(rank=rank, scaling=scaling, dropout=_dropout(fields, "dropout"))
        scaling = Fields({"scaling": _number(metadata.get("scaling"))}).optional_number("scaling")
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None
    if scaling is None:
        logger.warning("%s: has no lora.scaling; taken as %g, as mistral-inference does", path, DEFAULT_SCALING)
        scaling = DEFAULT_SCALING
    return AdapterSettings(rank=rank, scaling=scaling)


def _number(text: str | None) -> Any:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def peft_document(
    settings: AdapterSettings, modules: Iterable[str], *, wrapped: bool, kept: Mapping[str, Any] | None
) -> dict[str, Any]:
    """adapter_config.json for an adapter of the HF `modules`: `kept`, the source's own, if it still says the same.

    Beside a vision tower, whose modules have the same last names, the text decoder's are given by a pattern.
    """
    if kept is not None:
        found = settings_of_peft(kept)
        if found == dataclasses.replace(settings, base=settings.base or found.base):
            return dict(kept)
    names = sorted({module.rsplit(".", 1)[-1] for module in modules})
    alpha = settings.scaling * settings.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "r": settings.rank,
        "target_modules": rf".*\.language_model\..*\.({'|'.join(names)})" if wrapped else names,
        "use_dora": False,
        "use_rslora": False,
    }


def mistral_document(settings: AdapterSettings, params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of the base with the block `lora`; other keys of a block that is there are kept."""
    old = params.get("lora") if isinstance(params.get("lora"), dict) else {}
    block = {"enable": True, "rank": settings.rank, "dropout": settings.dropout, "scaling": settings.scaling}
    return {**params, "lora": {**block, **(old or {}), "rank": settings.rank, "scaling": settings.scaling}}


def require_rank(settings: AdapterSettings, ranks: Iterable[int], path: Path) -> None:
    """That every pair of matrices has the rank that the settings say, which the factor depends on."""
    wrong = sorted(set(ranks) - {settings.rank})
    if wrong:
        raise CheckpointError(f"{path}: has matrices of rank {wrong[0]}; expected {settings.rank} by its config")
