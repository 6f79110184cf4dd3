"""LoRA adapters as files: mistral-finetune's lora.safetensors and PEFT's folder. Their settings, not their tensors.

mistral: `output = W x + scaling B A x`, with `lora: {rank, scaling}` in params.json. PEFT: the factor is
`lora_alpha / r`, or over the root of r, by adapter_config.json. Nothing is computed beyond that factor.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...config_files.fields import Fields
from ...config_files.json_file import read_json_object
from ...errors import CheckpointError, ConfigError
from ...module_patterns import MOST_PATTERNS, first_match, pattern_problem

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
    "use_qalora",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
# The parameters that all experts of a layer are; adapters of other parameters alone are not read.
_PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
# First values that leave the base's weights as they are; after the others, the adapter belongs to a changed base.
_KNOWN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterSettings:
    """Rank, the factor that B A is multiplied by, dropout in training, and the base model's name if it is known.

    `rank_pattern` and `alpha_pattern` are PEFT's, of modules that differ; `alpha` and `rooted` what factors come from.
    """

    rank: int
    scaling: float
    dropout: float = 0.0
    base: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha: float | None = None
    rooted: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its HF name."""
        return first_match(self.rank_pattern, (module,), self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of a module, by its HF name."""
        if self.alpha is None:
            return self.scaling
        rank = self.rank_of(module)
        return first_match(self.alpha_pattern, (module,), self.alpha) / (math.sqrt(rank) if self.rooted else rank)


def is_peft(folder: Path) -> bool:
    return (folder / PEFT_CONFIG).is_file()


def is_mistral_adapter(folder: Path) -> bool:
    """Whether `folder` has an adapter of mistral-finetune and no model beside it."""
    return (folder / MISTRAL_FILE).is_file() and not any(folder.glob("consolidated*.safetensors"))


def require_adapter(folder: Path) -> None:
    """That `folder` has an adapter of either layout. Raises CheckpointError."""
    if not is_peft(folder) and not is_mistral_adapter(folder):
        raise CheckpointError(
            f"{folder}: no adapter; expected a folder with {PEFT_CONFIG} and {PEFT_FILE}, or with {MISTRAL_FILE} and "
            "no model beside it"
        )


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
            raise fields.error(key, "none: only plain LoRA can be read")
    _require_parameters(fields)
    start = document.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _KNOWN_STARTS):
        raise fields.error("init_lora_weights", "true: others change the base's weights, or are not known")
    rank = fields.integer("r", 8)
    alpha = fields.number("lora_alpha", 8.0)
    rooted = fields.boolean("use_rslora", False)
    base = document.get("base_model_name_or_path")
    return AdapterSettings(
        rank=rank,
        scaling=alpha / (math.sqrt(rank) if rooted else rank),
        dropout=_dropout(fields, "lora_dropout"),
        base=base if isinstance(base, str) else None,
        rank_pattern=_pattern(fields, "rank_pattern", Fields.integer),
        alpha_pattern=_pattern(fields, "alpha_pattern", Fields.number),
        alpha=alpha,
        rooted=rooted,
    )


def _require_parameters(fields: Fields) -> None:
    """That no parameters are targeted by themselves but those of experts."""
    targets = fields.value("target_parameters") or []
    ends = (*_PARAMETERS, *(name.rpartition(".")[2] for name in _PARAMETERS))
    known = isinstance(targets, list) and all(
        isinstance(target, str) and f".{target}".endswith(tuple(f".{end}" for end in ends)) for target in targets
    )
    if not known:
        raise fields.error("target_parameters", f"only {' and '.join(_PARAMETERS)}, or nothing")


def _pattern(fields: Fields, key: str, read: Callable[[Fields, str], Any]) -> dict[str, Any]:
    """An object from regular expressions to positive numbers; where it is absent or null, an empty one."""
    block = fields.block(key)
    if block is None:
        return {}
    if len(block.keys()) > MOST_PATTERNS:
        raise ConfigError(f"{fields.name(key)}: has {len(block.keys())} patterns, expected at most {MOST_PATTERNS}")
    for pattern in block.keys():  # noqa: SIM118
        problem = pattern_problem(pattern)
        if problem:
            raise ConfigError(f"{fields.name(key)}: {problem}")
    return {pattern: read(block, pattern) for pattern in block.keys()}  # noqa: SIM118


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
    settings: AdapterSettings,
    modules: Mapping[str, tuple[int, float]],
    parameters: Mapping[str, tuple[int, float]],
    config: ModelConfig,
    *,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """adapter_config.json for an adapter of the HF `modules` and, of experts, `parameters`, each of a rank and factor.

    `kept` is the source's own document, written if it still says the same. Beside a vision tower, whose modules have
    the same last names, the text decoder's are given by a pattern. PEFT refuses dropout before the A of experts.
    """
    adapted = {**modules, **parameters}
    dropout = 0.0 if parameters else settings.dropout
    if kept is not None:
        found = settings_of_peft(kept)
        same = all((found.rank_of(name), found.scaling_of(name)) == value for name, value in adapted.items())
        same = same and bool(kept.get("target_parameters")) == bool(parameters)
        if same and found.dropout == dropout and found.base == (settings.base or found.base):
            return dict(kept)
    (rank, factor), _ = Counter(adapted.values()).most_common(1)[0]
    alphas = {name: r * scaling for name, (r, scaling) in adapted.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(rank * factor),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "r": rank,
        "rank_pattern": {name: r for name, (r, _) in adapted.items() if r != rank},
        "alpha_pattern": {name: _whole(a) for name, a in alphas.items() if a != rank * factor},
        "target_modules": _target_modules(list(modules), config),
        "target_parameters": _target_parameters(list(parameters), config),
        "use_dora": False,
        "use_rslora": False,
    }


def _target_modules(modules: list[str], config: ModelConfig) -> list[str] | str:
    """The last names of the modules if every layer has them all, else the modules one by one."""
    places = Counter(map(_place, modules))
    if any(count != config.n_layers for count in places.values()):
        return modules
    names = sorted({module.rsplit(".", 1)[-1] for module in modules})
    return rf".*\.language_model\..*\.({'|'.join(names)})" if config.vision and names else names


def _target_parameters(parameters: list[str], config: ModelConfig) -> list[str] | None:
    """The last names of the parameters if every layer with experts has them all, else the parameters one by one."""
    places = Counter(map(_place, parameters))
    with_experts = config.n_layers - (config.moe.first_dense_layers if config.moe else 0)
    if any(count != with_experts for count in places.values()):
        return parameters
    return sorted({name[name.index("mlp.") :] for name in parameters}) or None


def _place(name: str) -> str:
    return re.sub(r"\blayers\.[0-9]+\.", "", name)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def mistral_document(settings: AdapterSettings, params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of the base with the block `lora`; other keys of a block that is there are kept."""
    old = params.get("lora") if isinstance(params.get("lora"), dict) else {}
    block = {"enable": True, "rank": settings.rank, "dropout": settings.dropout, "scaling": settings.scaling}
    return {**params, "lora": {**block, **(old or {}), "rank": settings.rank, "scaling": settings.scaling}}


def require_ranks(settings: AdapterSettings, ranks: Mapping[str, int], path: Path) -> None:
    """That the matrices of each HF module have the rank that the settings say, which the factor depends on."""
    for module, rank in ranks.items():
        if rank != settings.rank_of(module):
            raise CheckpointError(
                f"{path}: {module} has matrices of rank {rank}; expected {settings.rank_of(module)} by its config"
            )


def one_factor(settings: AdapterSettings, ranks: Mapping[str, int], path: Path) -> float:
    """What all HF modules are multiplied by, one number in the mistral layout. Raises where there are several."""
    factors = {settings.scaling_of(module) for module in ranks}
    if len(factors) > 1:
        raise CheckpointError(
            f"{path}: its modules have factors from {min(factors):g} to {max(factors):g}, the mistral layout one for "
            "all; expected --to hf"
        )
    return factors.pop()
