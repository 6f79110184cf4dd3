"""Reading and writing both kinds of config file, on the contents of the published ones."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ministral_jax import catalog
from ministral_jax.config import ModelConfig, RopeConfig, YarnConfig
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
    HF_MINISTRAL_8B,
    PARAMS,
    SMALL_CONFIG,
    SMALL_PARAMS,
)


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


def test_layer_types_are_followed_and_told_of_where_transformers_would_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    types = ["full_attention", "sliding_attention"] * 4
    config = read_config(
        as_written(tmp_path / "config.json", {**SMALL_CONFIG, "sliding_window": 5, "layer_types": types})
    )
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
    "stale yarn keys": {**SMALL_CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **STALE}},
    "superseded block": {**SMALL_CONFIG, "rope_scaling": {"rope_type": "default"}, "rope_parameters": STALE},
}


@pytest.mark.parametrize("name", HF_SOURCES)
def test_an_edited_config_is_written_with_the_edit_in_config_json(name: str) -> None:
    for edited in edits(config_from_hf(HF_SOURCES[name])):
        written = json.loads(json.dumps(hf_from_config(edited)))
        assert config_from_hf(written) == edited
        if "stale" in name:
            assert written["rope_parameters"]["note"] == "kept"


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
    as_written(tmp_path / "params.json", SMALL_PARAMS)
    as_written(tmp_path / "config.json", {**SMALL_CONFIG, "vocab_size": 256})
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
    write_params_json(config_from_params(SMALL_PARAMS), target)
    assert [path.name for path in tmp_path.iterdir()] == ["params.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_params_json(config_from_params(SMALL_PARAMS), tmp_path / "params.json" / "params.json")


def test_equality_of_configs_is_of_what_the_model_is() -> None:
    assert config_from_params({**SMALL_PARAMS, "note": 1}) == config_from_params(SMALL_PARAMS)
    assert hash(config_from_params({**SMALL_PARAMS, "note": 1})) == hash(config_from_params(SMALL_PARAMS))


HF_DOCUMENTS: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "ministral-8b": HF_MINISTRAL_8B,
    "small": SMALL_CONFIG,
    "defaults": {key: SMALL_CONFIG[key] for key in list(SMALL_CONFIG)[:6]} | {"vocab_size": 128},
    "ministral3 defaults": {**SMALL_CONFIG, "model_type": "ministral3"},
    "ministral defaults": {key: value for key, value in SMALL_CONFIG.items() if key != "sliding_window"}
    | {"model_type": "ministral"},
    "legacy yarn": {**SMALL_CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "partly scaled": {
        **SMALL_CONFIG,
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
