"""config.json, the config of the HF layout, into and out of ModelConfig. Absent keys mean what transformers takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import LatentAttentionConfig, ModelConfig, MoEConfig
from ..errors import ConfigError
from .fields import Fields
from .json_file import write_json
from .quantization_block import hf_of_quantization, quantization_of_hf
from .rope_fields import RopeDefaults, hf_of_rope, rope_of_hf
from .vision_fields import hf_of_vision, vision_of_hf
from .window_fields import FULL, MAX_LAYERS, SLIDING, windows_of_hf
from .written import document_of

# What a file without rope_parameters means to transformers' Ministral3Config and Mistral4Config.
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
_MINISTRAL3_ROPE = {**_YARN, "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
_MISTRAL4_ROPE = {**_YARN, "rope_theta": 1e4, "factor": 128.0, "original_max_position_embeddings": 8192}
_TEMPERED = {"llama_4_scaling_beta": 0.1}


@dataclass(frozen=True, kw_only=True)
class _Family:
    """A text model_type: its class in transformers, and what that class takes where the file is silent."""

    architecture: str
    max_length: int = 131072
    norm_eps: float = 1e-6
    window: int | None = None
    theta: float = 1e4
    rope: Mapping[str, Any] | None = None
    head_dim: int | None = None
    n_kv_heads: int = 8
    tempered: bool = False
    pad_token: int | None = None


_FAMILIES = {
    "mistral": _Family(architecture="MistralForCausalLM", window=4096),
    "mixtral": _Family(architecture="MixtralForCausalLM", norm_eps=1e-5, theta=1e6),
    "ministral": _Family(architecture="MinistralForCausalLM", window=4096),
    "ministral3": _Family(
        architecture="Ministral3ForCausalLM",
        max_length=262144,
        norm_eps=1e-5,
        rope={**_MINISTRAL3_ROPE, **_TEMPERED},
        head_dim=128,
        tempered=True,
        pad_token=11,
    ),
    "mistral4": _Family(
        architecture="Mistral4ForCausalLM",
        max_length=1048576,
        rope={**_MISTRAL4_ROPE, **_TEMPERED},
        n_kv_heads=32,
        tempered=True,
        pad_token=11,
    ),
}

_WRAPPER = "mistral3"


def config_from_hf(document: Mapping[str, Any]) -> ModelConfig:
    """The model that the parsed config.json `document` describes. Raises ConfigError, naming the key.

    Knows model_type mistral, mixtral, ministral, ministral3, mistral4, and mistral3, which wraps one of them and a
    vision tower. hidden_size, intermediate_size, num_hidden_layers, num_attention_heads and vocab_size must be there.
    """
    return dataclasses.replace(_read(Fields(document)), extra={"hf": dict(document)})


def _read(fields: Fields) -> ModelConfig:
    kind = fields.choice("model_type", (*_FAMILIES, _WRAPPER))
    if kind != _WRAPPER:
        return _read_text(fields, kind, tied=fields.boolean("tie_word_embeddings", False), outer=fields)
    text = fields.required_block("text_config")
    text_kind = text.choice("model_type", tuple(_FAMILIES), "mistral")
    config = _read_text(text, text_kind, tied=fields.boolean("tie_word_embeddings", True), outer=fields)
    return dataclasses.replace(config, vision=vision_of_hf(fields))


def _read_text(fields: Fields, kind: str, *, tied: bool, outer: Fields) -> ModelConfig:
    family = _FAMILIES[kind]
    fields.choice("hidden_act", ("silu",), "silu")
    fields.must_be("attention_bias", False, "no Mistral model has biases")
    n_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    max_length = fields.integer("max_position_embeddings", family.max_length)
    latent = _latent(fields) if kind == "mistral4" else None
    head_dim = _head_dim(fields, family, latent)
    share = latent.rope_head_dim / head_dim if latent else 1.0
    block = None if family.rope is None else dict(family.rope)
    defaults = RopeDefaults(theta=family.theta, block=block, tempered=family.tempered, rotated_share=share)
    rope, temperature = rope_of_hf(fields, max_length, defaults)
    hidden_dim = fields.integer("intermediate_size")
    return ModelConfig(
        dim=fields.integer("hidden_size"),
        n_layers=n_layers,
        n_heads=fields.integer("num_attention_heads"),
        n_kv_heads=_kv_heads(fields, family),
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", family.norm_eps, maximum=1.0),
        rope=rope,
        windows=(None,) * n_layers if latent else windows_of_hf(fields, n_layers, family.window),
        max_length=max_length,
        tied_embeddings=tied,
        temperature=temperature,
        moe=_moe(fields, kind, hidden_dim),
        latent=latent,
        quantization=quantization_of_hf(outer),
    )


def _kv_heads(fields: Fields, family: _Family) -> int:
    if fields.has("num_key_value_heads") and fields.value("num_key_value_heads") is None:
        return fields.integer("num_attention_heads")
    return fields.integer("num_key_value_heads", family.n_kv_heads)


def _head_dim(fields: Fields, family: _Family, latent: LatentAttentionConfig | None) -> int:
    if latent is not None:
        return latent.nope_head_dim + latent.rope_head_dim
    given = fields.optional_integer("head_dim")
    if given is not None:
        return given
    if family.head_dim is not None and not fields.has("head_dim"):
        return family.head_dim
    dim, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if dim % n_heads:
        raise fields.error(
            "head_dim", f"one, since hidden_size={dim} is not divisible by num_attention_heads={n_heads}"
        )
    return dim // n_heads


def _latent(fields: Fields) -> LatentAttentionConfig:
    fields.must_be("rope_interleave", True, "latent attention turns adjacent pairs")
    return LatentAttentionConfig(
        q_rank=fields.integer("q_lora_rank", 1024),
        kv_rank=fields.integer("kv_lora_rank", 256),
        rope_head_dim=fields.integer("qk_rope_head_dim", 64),
        nope_head_dim=fields.integer("qk_nope_head_dim", 64),
        v_head_dim=fields.integer("v_head_dim", 128),
    )


def _moe(fields: Fields, kind: str, hidden_dim: int) -> MoEConfig | None:
    if kind == "mixtral":
        return MoEConfig(
            n_experts=fields.integer(_first_of(fields, "num_local_experts", "num_experts"), 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
            expert_hidden_dim=hidden_dim,
        )
    if kind != "mistral4":
        return None
    fields.must_be("n_group", 1, "experts are not routed in groups")
    fields.must_be("topk_group", 1, "experts are not routed in groups")
    fields.must_be("norm_topk_prob", True, "the weights of the chosen experts sum to 1")
    return MoEConfig(
        n_experts=fields.integer(_first_of(fields, "n_routed_experts", "num_local_experts"), 128),
        experts_per_token=fields.integer("num_experts_per_tok", 4),
        expert_hidden_dim=fields.integer("moe_intermediate_size", 2048),
        n_shared_experts=fields.integer("n_shared_experts", 1, minimum=0),
        first_dense_layers=fields.integer("first_k_dense_replace", 0, minimum=0),
        routed_scale=fields.number("routed_scaling_factor", 1.0),
    )


def _first_of(fields: Fields, key: str, alias: str) -> str:
    return alias if fields.has(alias) and not fields.has(key) else key


def hf_from_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`: its own source document if that still says the same, else written afresh.

    Raises ConfigError for what no class of transformers can say.
    """
    return document_of(config, "hf", _read, _fresh, {"bos_token_id": 1, "eos_token_id": 2})


def write_config_json(config: ModelConfig, path: str | Path) -> None:
    """Writes `hf_from_config(config)` to the file at `path`."""
    write_json(Path(path), hf_from_config(config))


def _fresh(config: ModelConfig) -> dict[str, Any]:
    text = _text_keys(config)
    quantization = (
        hf_of_quantization(config.quantization, has_vision=config.vision is not None) if config.quantization else {}
    )
    if config.vision is None:
        return {"architectures": [_FAMILIES[text["model_type"]].architecture], **text, **quantization}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": _WRAPPER,
        "tie_word_embeddings": config.tied_embeddings,
        **hf_of_vision(config.vision),
        "text_config": text,
        **quantization,
    }


def _text_keys(config: ModelConfig) -> dict[str, Any]:
    kind = _model_type(config)
    family = _FAMILIES[kind]
    keys: dict[str, Any] = {
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "rope_parameters": hf_of_rope(config, tempered=family.tempered),
        "tie_word_embeddings": config.tied_embeddings,
    }
    if config.rope.yarn is None and not family.tempered:
        keys["rope_theta"] = config.rope.theta  # transformers 4 looks for it here
    if family.pad_token is not None and config.vocab_size <= family.pad_token:
        keys["pad_token_id"] = None  # the class's own would lie outside the vocabulary
    return keys | _window_keys(config, kind) | _moe_keys(config, kind) | _latent_keys(config)


def _model_type(config: ModelConfig) -> str:
    mixed = len(set(config.windows)) > 1
    if config.latent:
        if config.moe is None or any(config.windows):
            raise _no_class("latent attention without experts, or with windows")
        return "mistral4"
    if config.moe:
        plain = MoEConfig(
            n_experts=config.moe.n_experts,
            experts_per_token=config.moe.experts_per_token,
            expert_hidden_dim=config.hidden_dim,
        )
        if config.moe != plain or mixed or config.temperature:
            raise _no_class("experts beyond Mixtral's (shared, scaled, after dense layers, windows or a temperature)")
        return "mixtral"
    if mixed:
        if config.temperature or len(set(config.windows) - {None}) > 1:
            raise _no_class("windows of two widths, or mixed windows with an attention temperature")
        return "ministral"
    return "ministral3" if config.temperature or config.rope.yarn else "mistral"


def _no_class(what: str) -> ConfigError:
    return ConfigError(f"no class of transformers has {what}: write params.json instead")


def _window_keys(config: ModelConfig, kind: str) -> dict[str, Any]:
    if kind == "mistral4":
        return {}
    keys: dict[str, Any] = {"sliding_window": next(filter(None, config.windows), None)}
    if kind == "ministral":
        keys["layer_types"] = [FULL if window is None else SLIDING for window in config.windows]
    return keys


def _moe_keys(config: ModelConfig, kind: str) -> dict[str, Any]:
    if config.moe is None:
        return {}
    keys: dict[str, Any] = {"num_experts_per_tok": config.moe.experts_per_token}
    if kind == "mixtral":
        return keys | {"num_local_experts": config.moe.n_experts}
    return keys | {
        "n_routed_experts": config.moe.n_experts,
        "moe_intermediate_size": config.moe.expert_hidden_dim,
        "n_shared_experts": config.moe.n_shared_experts,
        "first_k_dense_replace": config.moe.first_dense_layers,
        "routed_scaling_factor": config.moe.routed_scale,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }


def _latent_keys(config: ModelConfig) -> dict[str, Any]:
    if config.latent is None:
        return {}
    return {
        "q_lora_rank": config.latent.q_rank,
        "kv_lora_rank": config.latent.kv_rank,
        "qk_rope_head_dim": config.latent.rope_head_dim,
        "qk_nope_head_dim": config.latent.nope_head_dim,
        "v_head_dim": config.latent.v_head_dim,
        "rope_interleave": True,
    }
