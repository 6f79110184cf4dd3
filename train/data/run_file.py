"""What a run's YAML file says of its data, ours or mistral-finetune's. The rest of such a file is the trainer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ministral_jax.errors import MinistralError

from .config import DataConfig

EVALUATION = ("eval_instruct_data", "eval_preference_data")  # sources to evaluate on, beside the fields of DataConfig
_THEIR_MODEL, _OUR_MODEL = "model_id_or_path", "model"


@dataclass(frozen=True)
class RunFile:
    """The data of a run. `rows_per_step`: batch_size times num_microbatches, of one device in mistral-finetune.

    Of preference pairs, which batch_size counts, it is twice that.
    """

    config: DataConfig
    evaluation: DataConfig | None
    seq_len: int | None
    rows_per_step: int
    max_steps: int | None
    model: str | None


def read_run_file(path: Path, **options: Any) -> RunFile:
    """Reads the file; `options` are fields of DataConfig that count instead of its own.

    Raises:
        MinistralError: it is not there, not YAML, or a field of its data section is wrong.
    """
    document = read_document(path)
    section = _mapping(document.get("data", {}), f"{path}: data")
    try:
        config, evaluation = data_configs(section, like_mistral_finetune=_THEIR_MODEL in document)
        config = replace(config, **options)
    except MinistralError as error:
        raise MinistralError(f"{path}: {error}") from error
    rows = (_count(document, "batch_size", path) or 1) * (_count(document, "num_microbatches", path) or 1)
    model = document.get(_THEIR_MODEL, document.get(_OUR_MODEL))
    return RunFile(
        config=config,
        evaluation=None if evaluation is None else replace(evaluation, **options),
        seq_len=_count(document, "seq_len", path),
        rows_per_step=2 * rows if config.preference_data else rows,
        max_steps=_count(document, "max_steps", path),
        model=model if isinstance(model, str) else None,
    )


def data_configs(
    section: Mapping[str, Any], *, like_mistral_finetune: bool = False
) -> tuple[DataConfig, DataConfig | None]:
    """The config of a YAML file's data section, and that of its evaluation data if there is any.

    The section holds fields of DataConfig and EVALUATION. With `like_mistral_finetune` it holds that
    program's (`instruct.shuffle`, `instruct.dynamic_chunk_fn_call`), and its rules of training and packing are taken.

    Raises:
        MinistralError: an unknown field, or a value that is not allowed.
    """
    values = dict(section)
    instruct_data, preference_data = (_source_text(values.pop(name, None), name) for name in EVALUATION)
    instruct = _mapping(values.pop("instruct", {}), "data.instruct") if like_mistral_finetune else {}
    known = {field.name for field in fields(DataConfig)}
    _refuse_unknown(values, known | {*EVALUATION}, "data")
    _refuse_unknown(instruct, {"shuffle", "dynamic_chunk_fn_call"}, "data.instruct")
    for name in ("data", "instruct_data", "preference_data"):
        if name in values:
            values[name] = _source_text(values[name], name)
    config = DataConfig(**values)
    if like_mistral_finetune:
        config = replace(config.like_mistral_finetune(), shuffle=_flag(instruct, "shuffle"))
        config = replace(config, tool_prefixes=config.shuffle and _flag(instruct, "dynamic_chunk_fn_call"))
    if not instruct_data and not preference_data:
        return config, None
    sources = {"data": "", "instruct_data": instruct_data, "preference_data": preference_data}
    return config, replace(config, **sources).for_evaluation()


def read_document(path: Path) -> Mapping[str, Any]:
    """The keys of a YAML file. Raises MinistralError where it is not there, or holds anything else."""
    import yaml

    try:
        return _mapping(yaml.safe_load(path.read_bytes()), str(path))
    except OSError as error:
        raise MinistralError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise MinistralError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from error


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MinistralError(f"{where}: {type(value).__name__}, expected keys with values")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise MinistralError(f"{where}.{unknown[0]}: unknown, expected one of {', '.join(sorted(known))}")


def _source_text(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise MinistralError(f"data.{name}: {value!r}, expected paths separated by commas")
    return value or ""


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, True)
    if not isinstance(value, bool):
        raise MinistralError(f"data.instruct.{name}: {value!r}, expected true or false")
    return value


def _count(document: Mapping[str, Any], name: str, path: Path) -> int | None:
    value = document.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise MinistralError(f"{path}: {name}: {value!r}, expected a positive whole number")
    return value
