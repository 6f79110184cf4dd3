"""The many ways in which config files say one thing: windows, theta, YaRN, temperature, ties, experts, quantisation."""

import dataclasses
import math
from typing import Any

import pytest

from ministral_jax.config import MoEConfig, RopeConfig, TemperatureConfig, YarnConfig
from ministral_jax.config_files import (
    config_from_hf,
    config_from_params,
    hf_from_config,
    params_from_config,
)
from ministral_jax.errors import ConfigError
from tests.published_configs import (
    CONFIGS,
    FP8_BLOCK,
    HF_FP8,
    INT8,
    NVFP4,
    PARAMS,
    SMALL_CONFIG,
    SMALL_PARAMS,
)

F = None


@pytest.mark.parametrize(
    ("given", "windows"),
    [
        (16, (16,) * 8),
        ("16", (16,) * 8),
        (None, (F,) * 8),
        ([F, 16, 16, 16], (F, 16, 16, 16) * 2),
        ([F, "16"], (F, 16) * 4),
        ([16, 32, F, F, 4, 4, 4, 4], (16, 32, F, F, 4, 4, 4, 4)),
        ([16], (16,) * 8),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_a_window_may_be_a_number_a_numeric_string_a_list_or_null(
    key: str, given: object, windows: tuple[int | None, ...]
) -> None:
    config = config_from_params({**SMALL_PARAMS, "rope_theta": 1e6, key: given})
    assert config.windows == windows
    del config.extra["mistral"]  # so that it is written afresh
    assert config_from_params(params_from_config(config)).windows == windows


@pytest.mark.parametrize("given", [0, -4, "four", "4.0", [None] * 3, [], [[4]], True, 4.0, {"a": 4}, "٤", 2**40])
def test_a_window_that_is_none_of_these_is_refused_by_name(given: object) -> None:
    with pytest.raises(ConfigError, match=r"^sliding_window=.*expected"):
        config_from_params({**SMALL_PARAMS, "sliding_window": given})


def test_two_windows_that_differ_are_refused() -> None:
    assert config_from_params({**SMALL_PARAMS, "sliding_window": 4, "_sliding_window": "4"}).windows == (4,) * 8
    with pytest.raises(ConfigError, match="_sliding_window=8"):
        config_from_params({**SMALL_PARAMS, "sliding_window": 4, "_sliding_window": 8})


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 1e6),
        ({"sliding_window": None}, 1e6),
        ({"sliding_window": [None, None]}, 1e6),
        ({"sliding_window": 4096}, 1e4),
        ({"sliding_window": [None, 4096]}, 1e4),
        ({"sliding_window": 4096, "rope_theta": 5e5}, 5e5),
    ],
)
def test_theta_absent_from_params_json_follows_from_the_window(keys: dict[str, Any], theta: float) -> None:
    assert config_from_params({**SMALL_PARAMS, **keys}).rope == RopeConfig(theta=theta)


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 1e4),
        ({"model_type": "mixtral"}, 1e6),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 9e5}, "rope_parameters": {"rope_theta": 7e5}}, 9e5),
        ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 7e5}}, 7e5),
        ({"model_type": "ministral3"}, 1e6),
        ({"model_type": "ministral3", "rope_parameters": {"rope_type": "default"}}, 1e4),
    ],
)
def test_theta_of_config_json_is_in_the_block_else_at_the_top_else_the_classs(
    keys: dict[str, Any], theta: float
) -> None:
    assert config_from_hf({**SMALL_CONFIG, **keys}).rope.theta == theta


def yarn_of_params(**keys: object) -> YarnConfig | None:
    block = {"factor": 16, "original_max_position_embeddings": 64, **keys}
    return config_from_params({**SMALL_PARAMS, "yarn": block}).rope.yarn


def yarn_of_hf(**keys: object) -> YarnConfig | None:
    block = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, **keys}
    return config_from_hf({**SMALL_CONFIG, "rope_parameters": block}).rope.yarn


def test_yarn_is_the_same_in_both_spellings() -> None:
    unscaled = YarnConfig(factor=16.0, original_length=64, beta_fast=4.0, beta_slow=2.0, attention_factor=1.0)
    assert yarn_of_params(beta=4, alpha=2, apply_scale=False) == unscaled
    assert yarn_of_hf(beta_fast=4, beta_slow=2, mscale=1, mscale_all_dim=1) == unscaled
    scaled = dataclasses.replace(unscaled, attention_factor=0.1 * math.log(16) + 1)
    assert yarn_of_params(beta=4, alpha=2, apply_scale=True) == scaled
    assert yarn_of_params(beta=4, alpha=2) == scaled
    assert yarn_of_hf(beta_fast=4, beta_slow=2, mscale=1, mscale_all_dim=0) == scaled
    assert yarn_of_hf(beta_fast=4, beta_slow=2) == scaled


@pytest.mark.parametrize(
    ("factor", "value"), [(16, 1.277259), (36, 1.358352), (48, 1.387120), (64, 1.415888), (128, 1.485203), (1, 1.0)]
)
def test_the_attention_factor_of_a_scaled_yarn(factor: int, value: float) -> None:
    for yarn in (yarn_of_params(factor=factor, apply_scale=True), yarn_of_hf(factor=factor)):
        assert yarn is not None
        assert yarn.attention_factor == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"attention_factor": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}, 0.5),
        ({"attention_factor": None, "mscale": 0.5, "mscale_all_dim": 1.0}, 1.138629436 / 1.277258872),
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 1.277258872),
        ({"mscale": 0.5}, 1.277258872),
    ],
)
def test_the_attention_factor_of_config_json(keys: dict[str, Any], factor: float) -> None:
    yarn = yarn_of_hf(**keys)
    assert yarn is not None
    assert yarn.attention_factor == pytest.approx(factor, rel=1e-9)


def test_an_attention_factor_without_native_spelling_is_refused_in_params_json_only() -> None:
    rope = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "attention_factor": 0.5}
    config = config_from_hf({**SMALL_CONFIG, "rope_parameters": rope})
    with pytest.raises(ConfigError, match=r"attention_factor=0\.5 has no spelling in params\.json"):
        params_from_config(config)
    fresh = dataclasses.replace(config, extra={})
    assert config_from_hf(hf_from_config(fresh)) == config


def test_attention_temperature_is_off_where_beta_is_0() -> None:
    block = {"original_max_position_embeddings": 64, "beta": 0.1}
    on = TemperatureConfig(beta=0.1, original_length=64)
    assert config_from_params({**SMALL_PARAMS, "llama_4_scaling": block}).temperature == on
    assert config_from_params({**SMALL_PARAMS, "llama_4_scaling": {**block, "beta": 0}}).temperature is None
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}
    ministral3 = {**SMALL_CONFIG, "model_type": "ministral3", "rope_parameters": rope}
    assert config_from_hf(ministral3).temperature == on
    assert config_from_hf({**ministral3, "rope_parameters": {**rope, "llama_4_scaling_beta": 0}}).temperature is None
    # transformers' Mistral class does not look at it
    assert config_from_hf({**ministral3, "model_type": "mistral"}).temperature is None


def test_the_outer_tie_decides_and_is_on_where_mistral3_does_not_say() -> None:
    outer = CONFIGS["ministral-3-3b-base-2512"]
    untied = {**outer, "text_config": {**outer["text_config"], "tie_word_embeddings": False}}
    assert config_from_hf(untied).tied_embeddings
    assert not config_from_hf({**outer, "tie_word_embeddings": False}).tied_embeddings
    assert not config_from_hf(SMALL_CONFIG).tied_embeddings
    assert not config_from_params(SMALL_PARAMS).tied_embeddings


def test_an_absent_head_dim_is_the_share_of_a_head() -> None:
    assert config_from_params(SMALL_PARAMS).head_dim == 16
    assert config_from_hf(SMALL_CONFIG).head_dim == 16
    assert config_from_hf({**SMALL_CONFIG, "head_dim": None}).head_dim == 16
    assert config_from_hf({**SMALL_CONFIG, "model_type": "ministral3"}).head_dim == 128  # its class's default
    with pytest.raises(ConfigError, match="head_dim is missing"):
        config_from_params({**SMALL_PARAMS, "dim": 66})


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({}, 128_000),
        ({"max_seq_len": 512}, 512),
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 1024, "max_seq_len": 512}, 1024),
    ],
)
def test_the_maximal_length_of_params_json(keys: dict[str, Any], length: int) -> None:
    assert config_from_params({**SMALL_PARAMS, **keys}).max_length == length


def test_layer_types_say_which_layers_the_window_is_for() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 2
    document = {**SMALL_CONFIG, "model_type": "ministral", "sliding_window": 5, "layer_types": types}
    config = config_from_hf(document)
    assert config.windows == (None, 5, 5, 5) * 2
    written = hf_from_config(dataclasses.replace(config, extra={}))
    assert (written["model_type"], written["layer_types"], written["sliding_window"]) == ("ministral", types, 5)
    with pytest.raises(ConfigError, match=r"layer_types.*8 entries"):
        config_from_hf({**document, "layer_types": types[:7]})
    with pytest.raises(ConfigError, match=r"sliding_window=None: expected .* layer_types\[1\]"):
        config_from_hf({**document, "sliding_window": None})


def test_what_the_experts_are() -> None:
    mixtral = config_from_params(PARAMS["mixtral-8x7b-v0.1"])
    assert mixtral.moe == MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=14336)
    large = config_from_params(PARAMS["mistral-large-3-675b-base-2512"]).moe
    assert large == MoEConfig(
        n_experts=128, experts_per_token=4, expert_hidden_dim=4096, n_shared_experts=1, first_dense_layers=3
    )


def quantized(keys: dict[str, Any], layout: str) -> tuple[str, str] | None:
    config = (
        config_from_params({**SMALL_PARAMS, **keys})
        if layout == "mistral"
        else config_from_hf({**SMALL_CONFIG, **keys})
    )
    return None if config.quantization is None else (config.quantization.format, config.quantization.activations)


NATIVE_FP8 = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"quantization": NATIVE_FP8}, ("fp8_tensor", "static")),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, ("fp8_tensor", "static")),
        ({"quantization": {**NATIVE_FP8, "qscheme_act": "NO_SCALES"}}, ("fp8_tensor", "dynamic")),
        ({"quantization": NVFP4}, ("nvfp4", "dynamic")),
        ({"quantization_config": FP8_BLOCK}, ("fp8_block", "dynamic")),
        ({"quantization": None}, None),
    ],
)
def test_quantization_of_params_json(block: dict[str, Any], expected: tuple[str, str] | None) -> None:
    assert quantized(block, "mistral") == expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (HF_FP8, ("fp8_tensor", "static")),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ("fp8_block", "dynamic")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8_block", "dynamic")),
        (INT8, ("int8_channel", "dynamic")),
        (FP8_BLOCK, ("fp8_block", "dynamic")),
        (NVFP4, ("nvfp4", "dynamic")),
        (None, None),
    ],
)
def test_quantization_of_config_json(block: dict[str, Any] | None, expected: tuple[str, str] | None) -> None:
    assert quantized({"quantization_config": block}, "hf") == expected


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method='gptq'"),
        ({**HF_FP8, "weight_block_size": [64, 64]}, "quantization_config.weight_block_size=[64, 64]"),
        ({**INT8, "format": "pack-quantized"}, "quantization_config.format='pack-quantized'"),
        ({**INT8, "config_groups": {}}, "quantization_config.config_groups={}"),
    ],
)
def test_an_unknown_quantization_is_refused_by_name(block: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_hf({**SMALL_CONFIG, "quantization_config": block})
    assert str(caught.value).startswith(field)


def test_what_one_layout_cannot_say_is_refused_with_the_other_named() -> None:
    config = config_from_params({**SMALL_PARAMS, "sliding_window": [None, 16, 32, 32]})
    with pytest.raises(ConfigError, match=r"windows of two widths.*write params.json"):
        hf_from_config(config)
    large = config_from_params(PARAMS["mistral-large-3-675b-base-2512"])
    assert large.vision
    plain = dataclasses.replace(large.vision, pre_projector_norm=False)
    with pytest.raises(ConfigError, match="Pixtral 12B"):
        hf_from_config(dataclasses.replace(large, vision=plain))
