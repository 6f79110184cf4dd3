"""params.json, the config of the mistral layout, into and out of ModelConfig."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..catalog import published_length
from ..config import LatentAttentionConfig, ModelConfig, MoEConfig
from ..errors import ConfigError
from .fields import Fields
from .json_file import write_json
from .quantization_block import params_of_quantization, quantization_of_params
from .rope_fields import params_of_rope, rope_of_params, temperature_of_params
from .vision_fields import params_of_vision, vision_of_params
from .window_fields import MAX_LAYERS, shortest_pattern, windows_of_params
from .written import document_of

# vLLM's, for a file that names no length and fits no published model.
DEFAULT_MAX_LENGTH = 128_000


def config_from_params(document: Mapping[str, Any]) -> ModelConfig:
    """The model that the parsed params.json `document` describes. Raises ConfigError, naming the key.

    Where the file does not say: head_dim is dim / n_heads, theta is 1e4 with a window and 1e6 without, embeddings are
    untied, and the maximal length is that of the published model with these shapes, else 128000.
    """
    return dataclasses.replace(_read(Fields(document)), extra={"mistral": dict(document)})


def _read(fields: Fields) -> ModelConfig:
    fields.choice("model_type", ("transformer",), "transformer")
    fields.choice("activation", ("silu",), "silu")
    n_layers = fields.integer("n_layers", maximum=MAX_LAYERS)
    windows = windows_of_params(fields, n_layers)
    hidden_dim = fields.integer("hidden_dim")
    latent = _latent(fields)
    config = ModelConfig(
        dim=fields.integer("dim"),
        n_layers=n_layers,
        n_heads=fields.integer("n_heads"),
        n_kv_heads=fields.integer("n_kv_heads", fields.integer("n_heads")),
        head_dim=_head_dim(fields, latent),
        hidden_dim=hidden_dim,
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("norm_eps", maximum=1.0),
        rope=rope_of_params(fields, windowed=any(windows)),
        windows=windows,
        max_length=DEFAULT_MAX_LENGTH,
        tied_embeddings=fields.boolean("tied_embeddings", False),
        temperature=temperature_of_params(fields),
        moe=_moe(fields, hidden_dim),
        latent=latent,
        vision=vision_of_params(fields),
        quantization=quantization_of_params(fields),
    )
    lengths = [fields.optional_integer(key) for key in ("max_position_embeddings", "max_seq_len")]
    length = lengths[0] or lengths[1] or published_length(config) or DEFAULT_MAX_LENGTH
    return dataclasses.replace(config, max_length=length)


def _head_dim(fields: Fields, latent: LatentAttentionConfig | None) -> int:
    given = fields.optional_integer("head_dim")
    if given is not None:
        return given
    if latent is not None:
        return latent.nope_head_dim + latent.rope_head_dim
    dim, n_heads = fields.integer("dim"), fields.integer("n_heads")
    if dim % n_heads:
        raise ConfigError(f"head_dim is missing and dim={dim} is not divisible by n_heads={n_heads}: expected head_dim")
    return dim // n_heads


def _latent(fields: Fields) -> LatentAttentionConfig | None:
    if fields.value("qk_nope_head_dim") is None:
        return None
    return LatentAttentionConfig(
        q_rank=fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        rope_head_dim=fields.integer("qk_rope_head_dim"),
        nope_head_dim=fields.integer("qk_nope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
    )


def _moe(fields: Fields, hidden_dim: int) -> MoEConfig | None:
    block = fields.block("moe")
    if block is None:
        return None
    block.must_be("route_every_n", 1, "every layer past the dense ones has experts")
    block.must_be("num_expert_groups", 1, "experts are not routed in groups")
    block.must_be("num_expert_groups_per_tok", 1, "experts are not routed in groups")
    block.must_be("use_load_balancing_bias", False, "the router has no bias")
    return MoEConfig(
        n_experts=block.integer("num_experts"),
        experts_per_token=block.integer("num_experts_per_tok"),
        expert_hidden_dim=block.integer("expert_hidden_dim", hidden_dim),
        n_shared_experts=block.integer("num_shared_experts", 0, minimum=0),
        first_dense_layers=block.integer("first_k_dense_replace", 0, minimum=0),
        routed_scale=block.number("routed_scale", 1.0),
    )


def params_from_config(config: ModelConfig) -> dict[str, Any]:
    """The params.json of `config`: its own source document if that still says the same, else written afresh.

    Raises ConfigError for what this layout cannot say.
    """
    return document_of(config, "mistral", _read, _fresh, {})


def write_params_json(config: ModelConfig, path: str | Path) -> None:
    """Writes `params_from_config(config)` to the file at `path`."""
    write_json(Path(path), params_from_config(config))


def _fresh(config: ModelConfig) -> dict[str, Any]:
    pattern = shortest_pattern(config.windows)
    keys: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        **params_of_rope(config),
        "max_position_embeddings": config.max_length,
        "tied_embeddings": config.tied_embeddings,
    }
    if any(pattern):
        keys["sliding_window"] = pattern[0] if len(pattern) == 1 else pattern
    if config.latent:
        keys |= {
            "q_lora_rank": config.latent.q_rank,
            "kv_lora_rank": config.latent.kv_rank,
            "qk_rope_head_dim": config.latent.rope_head_dim,
            "qk_nope_head_dim": config.latent.nope_head_dim,
            "v_head_dim": config.latent.v_head_dim,
        }
    if config.moe:
        keys["moe"] = _moe_block(config.moe, config.hidden_dim)
    if config.vision:
        keys["vision_encoder"] = params_of_vision(config.vision)
    if config.quantization:
        keys |= params_of_quantization(config.quantization)
    return keys


def _moe_block(moe: MoEConfig, hidden_dim: int) -> dict[str, Any]:
    block: dict[str, Any] = {"num_experts": moe.n_experts, "num_experts_per_tok": moe.experts_per_token}
    if moe == MoEConfig(n_experts=moe.n_experts, experts_per_token=moe.experts_per_token, expert_hidden_dim=hidden_dim):
        return block
    return block | {
        "expert_hidden_dim": moe.expert_hidden_dim,
        "num_shared_experts": moe.n_shared_experts,
        "first_k_dense_replace": moe.first_dense_layers,
        "routed_scale": moe.routed_scale,
        "route_every_n": 1,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
    }
