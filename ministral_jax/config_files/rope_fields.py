"""RoPE, YaRN and attention temperature in the spellings of both layouts. One rule for YaRN's attention factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config import ModelConfig, RopeConfig, TemperatureConfig, YarnConfig
from ..errors import ConfigError
from .fields import Fields

# Theta of a params.json that has none, as mistral-inference had it until May 2024; 7B v0.1 is the one with a window.
THETA_WITH_WINDOW = 1e4
THETA_WITHOUT_WINDOW = 1e6

# All that a block of config.json may say; what is left of an old block must not mix with a new one.
_HF_KEYS = (
    "rope_type",
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "llama_4_scaling_beta",
    "truncate",
)

# What a float32 cosine can resolve; attention factors closer than this are the same.
_SAME_FACTOR = 1e-7


def yarn_attention_factor(
    factor: float, *, mscale: float | None, mscale_all_dim: float | None, explicit: float | None = None
) -> float:
    """YaRN's factor on cosine and sine as transformers resolves it: g(mscale) / g(mscale_all_dim), or g(1) if one is 0.

    g(m) = 0.1 * m * ln(factor) + 1 (arXiv 2309.00071, equation 22). An `explicit` factor in the file goes first.
    """
    if explicit is not None:
        return explicit

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if mscale and mscale_all_dim:
        return grown(mscale) / grown(mscale_all_dim)
    return grown(1.0)


def _full_attention_factor(factor: float) -> float:
    return yarn_attention_factor(factor, mscale=1.0, mscale_all_dim=0.0)


def rope_of_params(fields: Fields, *, windowed: bool) -> RopeConfig:
    """RoPE of a params.json: without `rope_theta` the window decides; `yarn` scales unless `apply_scale` is false."""
    default = THETA_WITH_WINDOW if windowed else THETA_WITHOUT_WINDOW
    theta = fields.optional_number("rope_theta", minimum=1.0) or default
    block = fields.block("yarn")
    if block is None:
        return RopeConfig(theta=theta)
    factor = block.number("factor", minimum=1.0, above_minimum=False)
    yarn = YarnConfig(
        factor=factor,
        original_length=block.integer("original_max_position_embeddings"),
        beta_fast=block.number("beta", 32.0),
        beta_slow=block.number("alpha", 1.0),
        attention_factor=_full_attention_factor(factor) if block.boolean("apply_scale", True) else 1.0,
    )
    return RopeConfig(theta=theta, yarn=yarn)


def temperature_of_params(fields: Fields) -> TemperatureConfig | None:
    """Attention temperature of a params.json: the block `llama_4_scaling`, off where its beta is 0."""
    block = fields.block("llama_4_scaling")
    if block is None:
        return None
    length = block.integer("original_max_position_embeddings")
    beta = block.number("beta", above_minimum=False)
    return TemperatureConfig(beta=beta, original_length=length) if beta else None


def params_of_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of params.json that describe positions."""
    keys: dict[str, Any] = {"rope_theta": config.rope.theta}
    if config.rope.yarn:
        yarn = config.rope.yarn
        keys["yarn"] = {
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta": yarn.beta_fast,
            "alpha": yarn.beta_slow,
            "apply_scale": _applies_scale(yarn),
        }
    if config.temperature:
        length = config.temperature.original_length
        keys["llama_4_scaling"] = {"original_max_position_embeddings": length, "beta": config.temperature.beta}
    return keys


def _applies_scale(yarn: YarnConfig) -> bool:
    if math.isclose(yarn.attention_factor, 1.0, rel_tol=_SAME_FACTOR):
        return False
    full = _full_attention_factor(yarn.factor)
    if math.isclose(yarn.attention_factor, full, rel_tol=_SAME_FACTOR):
        return True
    raise ConfigError(
        f"yarn.attention_factor={yarn.attention_factor} has no spelling in params.json, which knows 1 and "
        f"{full:.6f} (0.1 ln {yarn.factor:g} + 1): write config.json instead"
    )


@dataclass(frozen=True, kw_only=True)
class RopeDefaults:
    """What a transformers class takes where config.json is silent: `theta`, and `block` if there is no block at all.

    `rotated_share` is the part of a head that turns, and `tempered` whether the class looks for a temperature.
    """

    theta: float
    block: dict[str, Any] | None
    tempered: bool
    rotated_share: float = 1.0


def rope_of_hf(fields: Fields, max_length: int, defaults: RopeDefaults) -> tuple[RopeConfig, TemperatureConfig | None]:
    """RoPE of a config.json, resolved as transformers 5 does: `rope_scaling`, `rope_parameters`, then the class."""
    block = _rope_block(fields, defaults)
    given = [owner.optional_number("rope_theta", minimum=1.0) for owner in (block, fields)]
    theta = next((value for value in given if value is not None), defaults.theta)
    type_key = "rope_type" if block.has("rope_type") else "type"
    kind = block.choice(type_key, ("default", "yarn"), "default")
    for owner in (block, fields):
        share = owner.number("partial_rotary_factor", defaults.rotated_share, maximum=1.0)
        if not math.isclose(share, defaults.rotated_share):
            raise owner.error(
                "partial_rotary_factor", f"{defaults.rotated_share:g}, the part of head_dim that this model turns"
            )
    temperature = _temperature_of_hf(block, kind, max_length) if defaults.tempered else None
    yarn = _yarn_of_hf(block, max_length) if kind == "yarn" else None
    return RopeConfig(theta=theta, yarn=yarn), temperature


def _rope_block(fields: Fields, defaults: RopeDefaults) -> Fields:
    Fields({}, fields.name("rope_parameters"), fields.asked).knows(*_HF_KEYS)
    legacy, block = fields.block("rope_scaling"), fields.block("rope_parameters")
    if legacy is not None and legacy.keys():
        block = legacy
    elif block is None:
        return Fields(defaults.block or {}, "rope_parameters", fields.asked)
    for nested in ("full_attention", "sliding_attention"):
        if block.has(nested):
            raise block.error(nested, "one set of rope parameters for all layers")
    return block


def _yarn_of_hf(block: Fields, max_length: int) -> YarnConfig:
    factor = block.number("factor", minimum=1.0, above_minimum=False)
    block.must_be("truncate", True, "the Mistral models round the borders of YaRN's ramp")
    return YarnConfig(
        factor=factor,
        original_length=block.integer("original_max_position_embeddings", max_length),
        beta_fast=block.optional_number("beta_fast", above_minimum=False) or 32.0,
        beta_slow=block.optional_number("beta_slow", above_minimum=False) or 1.0,
        attention_factor=yarn_attention_factor(
            factor,
            mscale=block.optional_number("mscale", above_minimum=False),
            mscale_all_dim=block.optional_number("mscale_all_dim", above_minimum=False),
            explicit=block.optional_number("attention_factor"),
        ),
    )


def _temperature_of_hf(block: Fields, kind: str, max_length: int) -> TemperatureConfig | None:
    beta = block.optional_number("llama_4_scaling_beta", above_minimum=False)
    if not beta:
        return None
    default = max_length if kind == "yarn" else None
    return TemperatureConfig(beta=beta, original_length=block.integer("original_max_position_embeddings", default))


def hf_of_rope(config: ModelConfig, *, tempered: bool) -> dict[str, Any]:
    """The block `rope_parameters` of config.json, for a class that looks for a temperature or does not.

    A latent-attention model gets an explicit attention factor: transformers would otherwise square mscale into the
    softmax scale, which the published models do not want.
    """
    block: dict[str, Any] = {"rope_theta": config.rope.theta, "rope_type": "default"}
    yarn, temperature = config.rope.yarn, config.temperature
    if yarn:
        block |= {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        block |= {"attention_factor": yarn.attention_factor} if config.latent else _hf_scale(yarn)
    if temperature:
        if yarn and yarn.original_length != temperature.original_length:
            raise ConfigError(
                f"config.json holds one original length, this model has {yarn.original_length} for YaRN and "
                f"{temperature.original_length} for the attention temperature: write params.json instead"
            )
        block["original_max_position_embeddings"] = temperature.original_length
    if tempered:
        block["llama_4_scaling_beta"] = temperature.beta if temperature else 0.0
        block.setdefault("original_max_position_embeddings", config.max_length)
    return block


def _hf_scale(yarn: YarnConfig) -> dict[str, float]:
    if yarn.attention_factor == 1.0:
        return {"mscale": 1.0, "mscale_all_dim": 1.0}
    if yarn.attention_factor == _full_attention_factor(yarn.factor):
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    return {"attention_factor": yarn.attention_factor}
