"""mistral-finetune's YAML files as ours: which key becomes which, and what is to be said of the rest. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ministral_jax.errors import ConfigError

from .config import coerced, refuse_unknown, section
from .optimizer import compat_config

COMPAT = "mistral-finetune"
_MODEL = "model_id_or_path"

# Their keys -> ours, where nothing but the name differs.
_RENAMED: Mapping[str, str] = {
    _MODEL: "model",
    "run_dir": "run_dir",
    "data": "data",
    "seed": "seed",
    "num_microbatches": "num_microbatches",
    "seq_len": "seq_len",
    "batch_size": "batch_size",
    "log_freq": "log_every",
}
# Ours that may stand beside theirs, from `--set` or in the file.
_OURS = ("mesh", "rules", "dtype", "to", "adapter_dtype", "tokenizer", "revision", "windows", "remat", "tensorboard")
_WITHOUT_MEANING: Mapping[str, str] = {
    "mlflow": "mlflow: not there; metrics are in metrics.train.jsonl and metrics.eval.jsonl",
    "world_size": "world_size: means nothing here; --mesh says over which devices",
    "variant": "variant: means nothing here",
}
_OTHERS = {
    *("optim", "max_norm", "max_steps", "ckpt_freq", "save_adapters", "no_ckpt", "num_ckpt_keep", "eval_freq"),
    *("no_eval", "checkpoint", "lora", "compat", "wandb"),
}
_GENERAL = (
    "read as a file of mistral-finetune: its packing, OneCycleLR with the cycling beta1, AdamW, and the mean of each "
    "device's means as the loss",
    "the data is not dealt out to devices line by line: all rows come from one sequence, in another order than theirs",
    "evaluation counts every row once, the last ones too, and perplexity is exp of the loss, not 2 to its power",
    "files for TensorBoard are written where tensorboard: true stands beside its keys",
)


def is_foreign(document: Mapping[str, Any]) -> bool:
    """Whether a document has their key for the model."""
    return _MODEL in document


def translated(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Their document with our keys, but for the data section, and notes: what differs, what means nothing here.

    Raises ConfigError for unknown keys and values that are not allowed.
    """
    refuse_unknown(document, {*_RENAMED, *_OURS, *_WITHOUT_MEANING, *_OTHERS}, "")
    if document.get("compat", COMPAT) != COMPAT:
        raise ConfigError(f"compat: {document['compat']!r}, expected {COMPAT}, whose key {_MODEL} is")
    ours = {_RENAMED[key]: value for key, value in document.items() if key in _RENAMED}
    ours |= {key: document[key] for key in _OURS if key in document}
    notes = [*_GENERAL, *(note for key, note in _WITHOUT_MEANING.items() if key in document)]
    data = section(document.get("data"), "data")
    if "shuffle" in data:
        notes.append("data.shuffle: means nothing here; instruct.shuffle decides for text too")
    ours["max_steps"] = document.get("max_steps", 100)
    ours["optimizer"] = _optimizer(document, ours["max_steps"])
    ours |= _adapters(document, notes) | _wandb(document, notes)
    ours |= {"batch_per_device": True, "rows_per_mean": document.get("batch_size", 1)}
    ours.setdefault("remat", "full" if _flag(document, "checkpoint", True) else "none")
    ours["checkpoints"] = {
        "every": document.get("ckpt_freq", 0),
        "keep": document.get("num_ckpt_keep") or 3,
        "best": False,
    }
    if _flag(document, "no_ckpt", False):
        notes.append("no_ckpt: the last state and the result are written all the same")
        ours["checkpoints"]["every"] = 0
    ours["eval"] = {"every": document.get("eval_freq", 0)}
    if _flag(document, "no_eval", True):
        ours["data"] = {key: value for key, value in data.items() if key != "eval_instruct_data"}
    return ours, notes


def _optimizer(document: Mapping[str, Any], max_steps: Any) -> dict[str, Any]:
    optim = section(document.get("optim"), "optim")
    defaults = {"lr": 1e-4, "weight_decay": 0.1, "pct_start": 0.05}
    refuse_unknown(optim, set(defaults), "optim")
    rate, decay, share = (coerced(float, optim.get(key, value), f"optim.{key}") for key, value in defaults.items())
    config = compat_config(
        learning_rate=rate,
        steps=coerced(int, max_steps, "max_steps"),
        weight_decay=decay,
        warmup_share=share,
        clip_norm=coerced(float, document.get("max_norm", 1.0), "max_norm"),
    )
    return {key: value for key, value in asdict(config).items() if key != "steps"}


def _adapters(document: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    lora = section(document.get("lora"), "lora")
    refuse_unknown(lora, {"enable", "rank", "dropout", "scaling"}, "lora")
    if not coerced(bool, lora.pop("enable", True), "lora.enable"):
        return {"full": True}
    if not _flag(document, "save_adapters", True):
        notes.append("save_adapters: the adapter is written; `ministral merge` puts it into its base")
    return {"lora": {"rank": 16, "scaling": 2.0} | lora}


def _wandb(document: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    wandb = section(document.get("wandb"), "wandb")
    refuse_unknown(wandb, {"project", "run_name", "offline", "key"}, "wandb")
    if wandb.pop("key", None):
        notes.append("wandb.key: means nothing here, nor there; wandb takes the key from WANDB_API_KEY or its login")
    if not wandb.get("project"):
        if wandb:
            notes.append("wandb.project: names none, so nothing goes to wandb")
        return {}
    return {"wandb": wandb | {"run_name": wandb.get("run_name") or None}}


def _flag(document: Mapping[str, Any], name: str, default: bool) -> bool:
    return coerced(bool, document.get(name, default), name)
