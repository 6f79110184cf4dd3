"""What a fine-tuning run is told: one frozen configuration, read from YAML and `--set`, and written beside the run.

Nothing is loaded or computed here. mistral-finetune's files are translated by foreign_config.py.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ministral_jax.errors import ConfigError
from ministral_jax.lora import LoraConfig
from ministral_jax.stacked import Remat

from .data.config import DataConfig
from .data.run_file import EVALUATION, data_configs, read_document
from .objective import PreferenceConfig
from .optimizer import OptimizerConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate after every so many steps, 0: after the last alone; over all the data, or its first `batches`."""

    every: int = 0
    batches: int | None = None

    def __post_init__(self) -> None:
        _at_least("eval.every", self.every, 0)
        _at_least("eval.batches", self.batches, 1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Save after every so many steps, 0: after the last alone; keep the last `keep` and, with `best`, the best."""

    every: int = 0
    keep: int = 3
    best: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoints.every", self.every, 0)
        _at_least("checkpoints.keep", self.keep, 1)


@dataclass(frozen=True)
class SamplesConfig:
    """Answer `prompts` after every so many steps and after the last, with at most `max_tokens` likeliest tokens each.

    Every prompt is what a user says, or with `chat` false the beginning of a text.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    chat: bool = True

    def __post_init__(self) -> None:
        _at_least("samples.every", self.every, 0)
        _at_least("samples.max_tokens", self.max_tokens, 1)
        if not all(self.prompts):
            raise ConfigError("samples.prompts: one is empty, expected texts")
        if self.every and not self.prompts:
            raise ConfigError(f"samples.every: {self.every}, but samples.prompts has none to answer")


@dataclass(frozen=True)
class WandbConfig:
    """The project at wandb that rows of metrics go to; `offline` keeps them in files for `wandb sync`.

    `run_name` None is the name of the run's folder.
    """

    project: str
    run_name: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if not self.project:
            raise ConfigError("wandb.project: empty, expected the name of a project at wandb")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run from the base model to the finished adapter, or model.

    Attributes:
        model: the base: a folder as published, or a Hugging Face id of `revision`.
        tokenizer: its file, or the folder of that; None is the model's own.
        run_dir: where everything of the run is written.
        data, eval_data: what is trained on; sources to evaluate on, of conversations, or of pairs with `preference`.
        lora: the adapters that are trained; None trains every weight.
        preference: learns from the pairs of `data.preference_data`, and batch_size counts pairs.
        optimizer: rates and AdamW, over `max_steps` steps.
        seq_len, batch_size, num_microbatches: a step takes num_microbatches x batch_size rows of seq_len tokens.
        batch_per_device: batch_size counts the rows of each device that has rows of its own, not those of all.
        rows_per_mean: as in TrainStep; None has every trained token count the same.
        eval, checkpoints, samples: when.
        log_every: steps from one line of metrics to the next.
        tensorboard, wandb: where else these lines go.
        mesh, rules: over which devices, and how; as in `load_model`. So are `dtype` and `windows`.
        remat: what the backward pass keeps (stacked.POLICIES).
        seed: of the data's order, the adapters' beginning and dropout.
        to, adapter_dtype: layout and dtype of what is written in the end; None is the base's.
    """

    model: str
    run_dir: str
    data: DataConfig
    eval_data: str = ""
    revision: str | None = None
    tokenizer: str | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    preference: PreferenceConfig | None = None
    optimizer: OptimizerConfig
    seq_len: int = 2048
    batch_size: int = 1
    num_microbatches: int = 1
    batch_per_device: bool = False
    rows_per_mean: int | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    log_every: int = 1
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    mesh: str | None = None
    rules: str = "all"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    windows: str | None = None
    remat: Remat = "full"
    seed: int = 0
    to: Literal["mistral", "hf"] | None = None
    adapter_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "num_microbatches", "rows_per_mean", "log_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        if self.lora is None and self.adapter_dtype is not None:
            raise ConfigError("adapter_dtype: has no meaning with full: true")
        if self.preference is None:
            if self.data.preference_data:
                raise ConfigError("data.preference_data: pairs are learned from with preference, which is not given")
            return
        if self.lora is None:
            raise ConfigError("preference: the reference is the model without adapters, so full: true cannot be")
        if self.rows_per_mean is not None:
            raise ConfigError("rows_per_mean: has no meaning with preference, where every pair counts the same")
        if not self.data.preference_data or self.data.data or self.data.instruct_data:
            raise ConfigError("preference: learns from data.preference_data alone, expected that and no other data")

    @property
    def max_steps(self) -> int:
        """Steps of the run."""
        return self.optimizer.steps

    @property
    def evaluation(self) -> DataConfig | None:
        """The data to evaluate on, if there is any."""
        if not self.eval_data:
            return None
        sources = {"data": "", "instruct_data": "", "preference_data": ""}
        kind = "instruct_data" if self.preference is None else "preference_data"
        return replace(self.data, **(sources | {kind: self.eval_data})).for_evaluation()

    def document(self) -> dict[str, Any]:
        """The same as a YAML document, every field in it, that `run_config` reads back."""
        values = asdict(self)
        values["data"][EVALUATION[self.preference is not None]] = values.pop("eval_data")
        values["max_steps"] = values["optimizer"].pop("steps")
        if values["lora"] is None:
            values["full"] = True
            del values["lora"]
        else:
            values["lora"]["targets"] = list(values["lora"]["targets"])
        values["samples"]["prompts"] = list(values["samples"]["prompts"])
        return values


class Reading(typing.NamedTuple):
    """A configuration, and what is to be said of how it was read."""

    config: RunConfig
    notes: list[str]


def read_run_config(path: str | Path, settings: Sequence[str] = ()) -> Reading:
    """Reads a run's YAML file, ours or mistral-finetune's, with `settings` such as "lora.rank=8" in place of its own.

    Raises MinistralError in one line, naming the file and the key, for what is unknown or not allowed.
    """
    document = dict(read_document(Path(path)))
    for setting in settings:
        document = _with_setting(document, setting)
    try:
        return run_config(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def run_config(document: Mapping[str, Any]) -> Reading:
    """The configuration in a YAML document, of ours or of mistral-finetune's keys, which `model_id_or_path` gives away.

    Raises MinistralError in one line.
    """
    from .foreign_config import is_foreign, translated

    foreign = is_foreign(document)
    notes: list[str] = []
    if foreign:
        document, notes = translated(document)
    values = dict(document)
    full, max_steps = values.pop("full", False), values.pop("max_steps", None)
    known = {f.name for f in fields(RunConfig)} - {"eval_data"} | {"full", "max_steps"}
    refuse_unknown(document, known, "")
    if max_steps is None:
        raise ConfigError("max_steps: missing, expected the number of steps")
    data = section(values.pop("data", None), "data")
    refuse_unknown(
        data, {f.name for f in fields(DataConfig)} | {*EVALUATION} | ({"instruct"} if foreign else set()), "data"
    )
    config, evaluation = data_configs(data, like_mistral_finetune=foreign)
    optimizer = {"learning_rate": LEARNING_RATE} | section(values.pop("optimizer", None), "optimizer")
    refuse_unknown(optimizer, {f.name for f in fields(OptimizerConfig)} - {"steps"}, "optimizer")
    preference = _preference(values.pop("preference", None), config)
    _refuse_other_evaluation(data, preference)
    lora, wandb = values.pop("lora", None), values.pop("wandb", None)
    if coerced(bool, full, "full") and lora is not None:
        raise ConfigError("lora: full: true trains every weight; expected one of the two")
    built: dict[str, Any] = {
        "data": config,
        "eval_data": (evaluation.instruct_data or evaluation.preference_data) if evaluation else "",
        "preference": preference,
        "lora": None if full else made(LoraConfig, _with_targets(section(lora, "lora")), "lora"),
        "optimizer": made(OptimizerConfig, optimizer | {"steps": coerced(int, max_steps, "max_steps")}, "optimizer"),
        "eval": made(EvalConfig, section(values.pop("eval", None), "eval"), "eval"),
        "checkpoints": made(CheckpointConfig, section(values.pop("checkpoints", None), "checkpoints"), "checkpoints"),
        "samples": made(SamplesConfig, section(values.pop("samples", None), "samples"), "samples"),
        "wandb": None if wandb is None else made(WandbConfig, section(wandb, "wandb"), "wandb"),
    }
    return Reading(made(RunConfig, values, "", **built), notes)


def _with_targets(lora: dict[str, Any]) -> dict[str, Any]:
    """The section with targets as a list, which may be names separated by commas."""
    targets = lora.get("targets")
    return lora | {"targets": [name.strip() for name in targets.split(",")]} if isinstance(targets, str) else lora


def _preference(value: Any, data: DataConfig) -> PreferenceConfig | None:
    """Data of pairs is learned from as such, with the defaults where nothing is said."""
    if value is None and not data.preference_data:
        return None
    return made(PreferenceConfig, section(value, "preference"), "preference")


def _refuse_other_evaluation(data: Mapping[str, Any], preference: PreferenceConfig | None) -> None:
    key, other = EVALUATION[preference is None], EVALUATION[preference is not None]
    if data.get(key):
        raise ConfigError(f"data.{key}: is not what this run learns from; expected data.{other}, or neither")


def made(kind: type[Any], values: Mapping[str, Any], where: str, **built: Any) -> Any:
    """The dataclass `kind` of a mapping; `built` are fields that are made already."""
    hints = typing.get_type_hints(kind)
    refuse_unknown(values, set(hints), where)
    given = {name: coerced(hints[name], value, _joined(where, name)) for name, value in values.items()} | built
    for f in fields(kind):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{_joined(where, f.name)}: missing")
    try:
        return kind(**given)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}.{error}") from error


def coerced(hint: Any, value: Any, where: str) -> Any:
    """`value` of YAML as the type `hint`; raises ConfigError naming `where`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        exact = [option for option in rest if type(value) is option]
        return coerced((exact or rest)[0], value, where)
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{where}: {value!r}, expected one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise ConfigError(f"{where}: {value!r}, expected a list")
        return tuple(coerced(options[0], part, where) for part in parts)
    if origin in (Mapping, dict):
        return {key: coerced(options[1], item, f"{where}.{key}") for key, item in section(value, where).items()}
    return _scalar(hint, value, where)


def _scalar(kind: type[Any], value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML takes 1e-4, without a point, for text
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    if type(value) is kind:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{where}: {value!r}, expected {names[kind]}")


def refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises ConfigError for the first key that is not `known`, with the nearest that is."""
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{_joined(where, str(key))}: unknown key; the nearest is {_joined(where, nearest)}")


def section(value: Any, where: str) -> dict[str, Any]:
    """A part of a document that holds keys; none is empty."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: {value!r}, expected keys with values")
    return dict(value)


def _with_setting(document: dict[str, Any], setting: str) -> dict[str, Any]:
    """The document with one "a.b=value" put in, the value read as YAML."""
    import yaml

    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting}: expected key=value, such as lora.rank=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {setting}: the value is not YAML") from None

    def put(level: Any, rest: list[str]) -> Any:
        if not rest:
            return value
        inside = section(level, f"--set {setting}")
        return inside | {rest[0]: put(inside.get(rest[0]), rest[1:])}

    return put(document, keys)


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name}: {value!r}, expected a whole number of at least {least}")
