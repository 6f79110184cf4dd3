"""Reading and writing both kinds of config file, on the contents of the published ones."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from ministral_jax import catalog
from ministral_jax.config import ModelConfig, MoEConfig, RopeConfig, TemperatureConfig, YarnConfig
from ministral_jax.config_files import (
    config_from_hf,
    config_from_params,
    detect_layout,
    hf_from_config,
    layout_of,
    params_from_config,
    read_config,
    write_config_json,
    write_params_json,
)
from ministral_jax.errors import ConfigError
from tests.published_configs import (
    CONFIGS,
    FP8_BLOCK,
    HF_FP8,
    HF_MINISTRAL_8B,
    INT8,
    NVFP4,
    PARAMS,
)

SMALL = {
    "dim": 64,
    "n_layers": 8,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 128,
}
HF_SMALL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "sliding_window": None,
}


def as_written(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("name", PARAMS)
def test_a_published_params_json_reads_as_its_catalog_entry(name: str) -> None:
    assert config_from_params(PARAMS[name]) == catalog.find(name).config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_json_reads_as_its_catalog_entry(name: str) -> None:
    assert config_from_hf(CONFIGS[name]) == catalog.find(name).config


@pytest.mark.parametrize("name", PARAMS)
def test_params_json_is_written_back_as_it_came(name: str, tmp_path: Path) -> None:
    source = as_written(tmp_path / "params.json", PARAMS[name])
    write_params_json(read_config(source), tmp_path / "again_params.json")
    assert json.loads((tmp_path / "again_params.json").read_text()) == PARAMS[name]
    again = read_config(tmp_path / "again_params.json")
    assert again == read_config(source)
    assert again.extra == read_config(source).extra == {"mistral": PARAMS[name]}


@pytest.mark.parametrize("document", [*CONFIGS.values(), HF_MINISTRAL_8B])
def test_config_json_is_written_back_as_it_came(document: dict[str, Any], tmp_path: Path) -> None:
    source = as_written(tmp_path / "config.json", document)
    write_config_json(read_config(source), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == document
    assert read_config(tmp_path / "again.json") == read_config(source)


@pytest.mark.parametrize("name", PARAMS)
def test_params_json_means_the_same_after_a_way_through_config_json(name: str) -> None:
    config = config_from_params(PARAMS[name])
    through = config_from_hf(json.loads(json.dumps(hf_from_config(config))))
    assert through == config
    assert config_from_params(json.loads(json.dumps(params_from_config(through)))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_means_the_same_after_a_way_through_params_json(name: str) -> None:
    config = config_from_hf(CONFIGS[name])
    through = config_from_params(json.loads(json.dumps(params_from_config(config))))
    assert through == config
    assert config_from_hf(json.loads(json.dumps(hf_from_config(through)))) == config


@pytest.mark.parametrize("name", [entry.name for entry in catalog.MODELS])
def test_every_catalog_config_is_written_and_read_in_both_layouts(name: str) -> None:
    config = catalog.find(name).config
    if config.quantization and config.quantization.format == "fp8_block":
        config = dataclasses.replace(config, quantization=None)  # needs the file's own block in params.json
    assert config_from_params(json.loads(json.dumps(params_from_config(config)))) == config
    assert config_from_hf(json.loads(json.dumps(hf_from_config(config)))) == config


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
    config = config_from_params({**SMALL, "rope_theta": 1e6, key: given})
    assert config.windows == windows
    del config.extra["mistral"]  # so that it is written afresh
    assert config_from_params(params_from_config(config)).windows == windows


@pytest.mark.parametrize("given", [0, -4, "four", "4.0", [None] * 3, [], [[4]], True, 4.0, {"a": 4}, "٤", 2**40])
def test_a_window_that_is_none_of_these_is_refused_by_name(given: object) -> None:
    with pytest.raises(ConfigError, match=r"^sliding_window=.*expected"):
        config_from_params({**SMALL, "sliding_window": given})


def test_two_windows_that_differ_are_refused() -> None:
    assert config_from_params({**SMALL, "sliding_window": 4, "_sliding_window": "4"}).windows == (4,) * 8
    with pytest.raises(ConfigError, match="_sliding_window=8"):
        config_from_params({**SMALL, "sliding_window": 4, "_sliding_window": 8})


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
    assert config_from_params({**SMALL, **keys}).rope == RopeConfig(theta=theta)


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
    assert config_from_hf({**HF_SMALL, **keys}).rope.theta == theta


def yarn_of_params(**keys: object) -> YarnConfig | None:
    block = {"factor": 16, "original_max_position_embeddings": 64, **keys}
    return config_from_params({**SMALL, "yarn": block}).rope.yarn


def yarn_of_hf(**keys: object) -> YarnConfig | None:
    block = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, **keys}
    return config_from_hf({**HF_SMALL, "rope_parameters": block}).rope.yarn


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
    config = config_from_hf({**HF_SMALL, "rope_parameters": rope})
    with pytest.raises(ConfigError, match=r"attention_factor=0\.5 has no spelling in params\.json"):
        params_from_config(config)
    fresh = dataclasses.replace(config, extra={})
    assert config_from_hf(hf_from_config(fresh)) == config


def test_attention_temperature_is_off_where_beta_is_0() -> None:
    block = {"original_max_position_embeddings": 64, "beta": 0.1}
    on = TemperatureConfig(beta=0.1, original_length=64)
    assert config_from_params({**SMALL, "llama_4_scaling": block}).temperature == on
    assert config_from_params({**SMALL, "llama_4_scaling": {**block, "beta": 0}}).temperature is None
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}
    ministral3 = {**HF_SMALL, "model_type": "ministral3", "rope_parameters": rope}
    assert config_from_hf(ministral3).temperature == on
    assert config_from_hf({**ministral3, "rope_parameters": {**rope, "llama_4_scaling_beta": 0}}).temperature is None
    # transformers' Mistral class does not look at it
    assert config_from_hf({**ministral3, "model_type": "mistral"}).temperature is None


def test_the_outer_tie_decides_and_is_on_where_mistral3_does_not_say() -> None:
    outer = CONFIGS["ministral-3-3b-base-2512"]
    untied = {**outer, "text_config": {**outer["text_config"], "tie_word_embeddings": False}}
    assert config_from_hf(untied).tied_embeddings
    assert not config_from_hf({**outer, "tie_word_embeddings": False}).tied_embeddings
    assert not config_from_hf(HF_SMALL).tied_embeddings
    assert not config_from_params(SMALL).tied_embeddings


def test_an_absent_head_dim_is_the_share_of_a_head() -> None:
    assert config_from_params(SMALL).head_dim == 16
    assert config_from_hf(HF_SMALL).head_dim == 16
    assert config_from_hf({**HF_SMALL, "head_dim": None}).head_dim == 16
    assert config_from_hf({**HF_SMALL, "model_type": "ministral3"}).head_dim == 128  # its class's default
    with pytest.raises(ConfigError, match="head_dim is missing"):
        config_from_params({**SMALL, "dim": 66})


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
    assert config_from_params({**SMALL, **keys}).max_length == length


def test_layer_types_say_which_layers_the_window_is_for() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"] * 2
    document = {**HF_SMALL, "model_type": "ministral", "sliding_window": 5, "layer_types": types}
    config = config_from_hf(document)
    assert config.windows == (None, 5, 5, 5) * 2
    written = hf_from_config(dataclasses.replace(config, extra={}))
    assert (written["model_type"], written["layer_types"], written["sliding_window"]) == ("ministral", types, 5)
    with pytest.raises(ConfigError, match=r"layer_types.*8 entries"):
        config_from_hf({**document, "layer_types": types[:7]})
    with pytest.raises(ConfigError, match=r"sliding_window=None: expected .* layer_types\[1\]"):
        config_from_hf({**document, "sliding_window": None})


def test_layer_types_are_followed_and_told_of_where_transformers_would_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    types = ["full_attention", "sliding_attention"] * 4
    config = read_config(as_written(tmp_path / "config.json", {**HF_SMALL, "sliding_window": 5, "layer_types": types}))
    assert config.windows == (None, 5) * 4
    assert "layer_types is followed" in caplog.text


def test_ministral_8b_windowed_everywhere_is_kept_and_told_of_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = read_config(as_written(tmp_path / "config.json", HF_MINISTRAL_8B))
    assert config.windows == (32768,) * 36
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "--windows interleaved" in record.getMessage()
    caplog.clear()
    assert read_config(tmp_path, windows="interleaved") == catalog.find("ministral-8b-2410").config  # its length, too
    assert not caplog.records


def test_other_windowed_models_are_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_config(as_written(tmp_path / "config.json", CONFIGS["mistral-7b-v0.1"]))
    read_config(as_written(tmp_path / "params.json", PARAMS["ministral-8b-instruct-2410"]))
    assert not caplog.records


def test_what_the_experts_are(tmp_path: Path) -> None:
    mixtral = config_from_params(PARAMS["mixtral-8x7b-v0.1"])
    assert mixtral.moe == MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=14336)
    large = config_from_params(PARAMS["mistral-large-3-675b-base-2512"]).moe
    assert large == MoEConfig(
        n_experts=128, experts_per_token=4, expert_hidden_dim=4096, n_shared_experts=1, first_dense_layers=3
    )


def quantized(keys: dict[str, Any], layout: str) -> tuple[str, str] | None:
    config = config_from_params({**SMALL, **keys}) if layout == "mistral" else config_from_hf({**HF_SMALL, **keys})
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
        config_from_hf({**HF_SMALL, "quantization_config": block})
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("name", ["mistral-large-3-675b-instruct-2512", "ministral-3-3b-instruct-2512"])
def test_a_quantization_block_survives_the_other_layout(name: str) -> None:
    config = config_from_params(PARAMS[name])
    through = config_from_hf(json.loads(json.dumps(hf_from_config(config)))).quantization
    assert config.quantization
    assert through
    assert through == config.quantization
    if "config_groups" in config.quantization.raw:
        assert through.raw == config.quantization.raw


def test_keys_we_do_not_know_outlive_an_edit() -> None:
    document = {**PARAMS["mistral-large-3-675b-base-2512"], "finetuned_by": {"whom": "us"}, "max_seq_len": 99}
    edited = dataclasses.replace(config_from_params(document), max_length=4096)
    written = params_from_config(edited)
    assert config_from_params(written) == edited
    assert written["finetuned_by"] == {"whom": "us"}
    assert written["moe"]["expert_parallel"] == 1
    assert written["max_position_embeddings"] == 4096
    assert "max_seq_len" not in written  # known, and superseded

    config = config_from_hf({**HF_MINISTRAL_8B, "eos_token_id": [2, 7]})
    interleaved = hf_from_config(catalog.with_windows(config, "interleaved"))
    assert interleaved["torch_dtype"] == "bfloat16"
    assert interleaved["eos_token_id"] == [2, 7]
    assert (interleaved["model_type"], interleaved["architectures"]) == ("ministral", ["MinistralForCausalLM"])
    assert config_from_hf(interleaved).windows == (None, 32768, 32768, 32768) * 9


def edits(config: ModelConfig) -> list[ModelConfig]:
    """Configs that differ from `config` in one part, each in another."""
    changes: list[dict[str, Any]] = [
        {"vocab_size": 17, "dim": 48, "norm_eps": 1e-4, "tied_embeddings": not config.tied_embeddings},
        {"max_length": 77},
        {"rope": RopeConfig(theta=123.0)},
        {"rope": RopeConfig(theta=123.0, yarn=YarnConfig(factor=3.0, original_length=99)), "temperature": None},
        {"temperature": None},
        {"vision": None},
        {"quantization": None},
    ]
    if config.latent is None:
        changes += [{"head_dim": 6}, {"windows": (None,) * config.n_layers}, {"windows": (7,) * config.n_layers}]
    return [dataclasses.replace(config, **change) for change in changes]


@pytest.mark.parametrize("name", PARAMS)
def test_an_edited_config_is_written_with_the_edit_in_params_json(name: str) -> None:
    for edited in edits(config_from_params(PARAMS[name])):
        assert config_from_params(json.loads(json.dumps(params_from_config(edited)))) == edited


STALE = {"mscale": 0.5, "mscale_all_dim": 1.0, "attention_factor": 0.5, "beta_fast": 3.0, "note": "kept"}
HF_SOURCES = {
    **CONFIGS,
    "stale yarn keys": {**HF_SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **STALE}},
    "superseded block": {**HF_SMALL, "rope_scaling": {"rope_type": "default"}, "rope_parameters": STALE},
}


@pytest.mark.parametrize("name", HF_SOURCES)
def test_an_edited_config_is_written_with_the_edit_in_config_json(name: str) -> None:
    for edited in edits(config_from_hf(HF_SOURCES[name])):
        written = json.loads(json.dumps(hf_from_config(edited)))
        assert config_from_hf(written) == edited
        if "stale" in name:
            assert written["rope_parameters"]["note"] == "kept"


def test_what_one_layout_cannot_say_is_refused_with_the_other_named() -> None:
    config = config_from_params({**SMALL, "sliding_window": [None, 16, 32, 32]})
    with pytest.raises(ConfigError, match=r"windows of two widths.*write params.json"):
        hf_from_config(config)
    large = config_from_params(PARAMS["mistral-large-3-675b-base-2512"])
    assert large.vision
    plain = dataclasses.replace(large.vision, pre_projector_norm=False)
    with pytest.raises(ConfigError, match="Pixtral 12B"):
        hf_from_config(dataclasses.replace(large, vision=plain))


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["params.json"], "mistral"),
        (["config.json", "consolidated.safetensors"], "hf"),
        (["params.json", "config.json", "consolidated.safetensors", "model.safetensors"], "mistral"),
        (["params.json", "config.json", "consolidated-00001-of-00002.safetensors"], "mistral"),
        (["params.json", "config.json", "model-00001-of-00002.safetensors", "consolidated.00.pth"], "hf"),
        (["params.json", "config.json", "consolidated.safetensors.index.json"], "hf"),
        (["model.safetensors"], None),
    ],
)
def test_the_layout_of_a_folder_is_decided_by_its_file_names(
    tmp_path: Path, names: list[str], layout: str | None
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert layout_of(names) == layout
    if layout is not None:
        assert detect_layout(tmp_path) == layout
        return
    with pytest.raises(ConfigError, match=r"neither params\.json nor config\.json"):
        detect_layout(tmp_path)


def test_a_folder_is_read_in_its_layout(tmp_path: Path) -> None:
    as_written(tmp_path / "params.json", SMALL)
    as_written(tmp_path / "config.json", {**HF_SMALL, "vocab_size": 256})
    assert read_config(tmp_path).vocab_size == 256
    (tmp_path / "consolidated.safetensors").touch()
    assert read_config(tmp_path).vocab_size == 128


def test_no_folder_and_no_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "params.json").mkdir()
    with pytest.raises(ConfigError, match="neither"):
        read_config(tmp_path)


def test_a_config_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "params.json"
    write_params_json(config_from_params(SMALL), target)
    assert [path.name for path in tmp_path.iterdir()] == ["params.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_params_json(config_from_params(SMALL), tmp_path / "params.json" / "params.json")


def test_equality_of_configs_is_of_what_the_model_is() -> None:
    assert config_from_params({**SMALL, "note": 1}) == config_from_params(SMALL)
    assert hash(config_from_params({**SMALL, "note": 1})) == hash(config_from_params(SMALL))


HF_DOCUMENTS: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "ministral-8b": HF_MINISTRAL_8B,
    "small": HF_SMALL,
    "defaults": {key: HF_SMALL[key] for key in list(HF_SMALL)[:6]} | {"vocab_size": 128},
    "ministral3 defaults": {**HF_SMALL, "model_type": "ministral3"},
    "ministral defaults": {key: value for key, value in HF_SMALL.items() if key != "sliding_window"}
    | {"model_type": "ministral"},
    "legacy yarn": {**HF_SMALL, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "partly scaled": {
        **HF_SMALL,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e5,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
        },
    },
}


def transformers_view(document: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json, in words of ModelConfig."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    outer = AutoConfig.for_model(**json.loads(json.dumps(document)))
    text = outer.get_text_config()
    kind = text.rope_parameters["rope_type"]
    factor = 1.0 if kind == "default" else ROPE_INIT_FUNCTIONS[kind](text, None)[1]
    return {
        "dim": text.hidden_size,
        "n_kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "norm_eps": text.rms_norm_eps,
        "max_length": text.max_position_embeddings,
        "theta": text.rope_parameters["rope_theta"],
        "attention_factor": pytest.approx(factor, rel=1e-12),
        "window": getattr(text, "sliding_window", None),
        "tied": outer.tie_word_embeddings,
    }


def our_view(config: ModelConfig) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "max_length": config.max_length,
        "theta": config.rope.theta,
        "attention_factor": config.rope.yarn.attention_factor if config.rope.yarn else 1.0,
        "window": config.windows[-1],
        "tied": config.tied_embeddings,
    }


@pytest.mark.parity
@pytest.mark.parametrize("name", HF_DOCUMENTS)
def test_config_json_means_what_transformers_makes_of_it(name: str) -> None:
    pytest.importorskip("transformers")
    assert our_view(config_from_hf(HF_DOCUMENTS[name])) == transformers_view(HF_DOCUMENTS[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", PARAMS)
def test_transformers_reads_what_we_write(name: str) -> None:
    pytest.importorskip("transformers")
    config = config_from_params(PARAMS[name])
    assert our_view(config) == transformers_view(hf_from_config(config))
