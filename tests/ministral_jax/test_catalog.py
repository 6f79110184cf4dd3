"""The catalog says what was published, and finds it by name."""

import re

import pytest

from ministral_jax import catalog
from ministral_jax.config_files import config_from_params
from ministral_jax.errors import ConfigError
from ministral_jax.memory import count_parameters
from tests.published_configs import PARAMS

# Text decoders, from the published shapes counted by hand.
PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "mixtral-8x7b-instruct-v0.1": 46_702_792_704,
    "mixtral-8x22b-v0.1": 140_620_634_112,
    "mixtral-8x22b-instruct-v0.1": 140_630_071_296,
    "mixtral-8x22b-v0.3": 140_630_071_296,
    "ministral-8b-instruct-2410": 8_019_808_256,
    "mistral-large-3-675b-base-2512": 673_421_089_792,
    "mistral-large-3-675b-instruct-2512": 673_421_089_792,
} | {
    f"ministral-3-{size}-{variant}-2512": n
    for size, n in (("3b", 3_429_006_336), ("8b", 8_489_553_920), ("14b", 13_506_073_600))
    for variant in ("base", "instruct", "reasoning")
}
WITHOUT_PUBLISHED_COUNT = {"mistral-small-4-119b-instruct-2603"}


def test_every_entry_has_a_count_to_be_held_against() -> None:
    assert {entry.name for entry in catalog.MODELS} == PARAMETERS.keys() | WITHOUT_PUBLISHED_COUNT


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_configs_have_as_many_parameters_as_were_published(name: str) -> None:
    assert count_parameters(catalog.find(name).config).text == PARAMETERS[name]


def test_small_4_is_of_the_size_in_its_name() -> None:
    entry = catalog.find("mistral-small-4-119b-instruct-2603")
    assert count_parameters(entry.config).text == pytest.approx(119e9, rel=0.01)


@pytest.mark.parametrize("entry", catalog.MODELS, ids=lambda entry: entry.name)
def test_a_model_is_found_by_its_name_and_its_hub_id(entry: catalog.ModelEntry) -> None:
    assert catalog.find(entry.name) is entry
    assert catalog.find(entry.repo_id) is entry
    assert catalog.find(entry.repo_id.upper()) is entry


def test_names_and_hub_ids_are_distinct() -> None:
    assert len({entry.name for entry in catalog.MODELS}) == len(catalog.MODELS)
    assert len({entry.repo_id for entry in catalog.MODELS}) == len(catalog.MODELS)


def test_the_variant_may_be_left_out_where_one_fits() -> None:
    assert catalog.find("ministral-8b-2410").name == "ministral-8b-instruct-2410"
    assert catalog.find("mistralai/Ministral-8B-2410").name == "ministral-8b-instruct-2410"
    with pytest.raises(ConfigError, match=r"ministral-3-8b-base-2512.*ministral-3-8b-instruct-2512"):
        catalog.find("ministral-3-8b-2512")


@pytest.mark.parametrize("name", ["ministral-8b-2401", "mistral-7b-v0.4", "Mixtral-8x7b", "", "llama\n"])
def test_an_unknown_name_gets_the_nearest_ones_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        catalog.find(name)
    message = str(caught.value)
    assert "\n" not in message
    suggested = re.findall(r"[\w.-]+", message.rpartition("nearest are ")[2])
    assert suggested
    assert all(catalog.find(suggestion) for suggestion in suggested)


def test_the_nearest_name_is_suggested_first() -> None:
    with pytest.raises(ConfigError, match="nearest are ministral-8b-instruct-2410"):
        catalog.find("ministral-8b-instruct-2411")


@pytest.mark.parametrize("name", ["ministral-3b-2410", "mistralai/Ministral-3B-Instruct-2410", "ministral-3b"])
def test_ministral_3b_of_2024_was_never_published(name: str) -> None:
    with pytest.raises(ConfigError, match="never published"):
        catalog.find(name)


def test_ministral_8b_interleaves_full_and_windowed_layers() -> None:
    config = catalog.find("ministral-8b-2410").config
    assert [i for i, window in enumerate(config.windows) if window is None] == list(range(0, 36, 4))
    assert set(config.windows) == {None, 32768}


def test_only_the_smallest_ministral_3_ties_its_embeddings() -> None:
    tied = {entry.name for entry in catalog.MODELS if entry.config.tied_embeddings}
    assert tied == {f"ministral-3-3b-{variant}-2512" for variant in ("base", "instruct", "reasoning")}


def test_what_was_not_seen_in_a_published_file_is_said() -> None:
    for name, words in (
        ("ministral-3-8b-reasoning-2512", "config.json was not seen"),
        ("mistral-large-3-675b-base-2512", "norm_eps is 1e-6 in one source"),
        ("ministral-8b-instruct-2410", "params.json was not seen"),
        ("ministral-3-14b-base-2512", "tokenizer's version was not seen"),
        ("mistral-small-4-119b-instruct-2603", "vision tower was not seen"),
    ):
        assert words in catalog.find(name).note


@pytest.mark.parametrize(
    ("name", "length"), [("mistral-7b-v0.3", 32768), ("mixtral-8x22b-v0.3", 65536), ("mistral-7b-v0.1", 32768)]
)
def test_a_params_json_without_length_gets_that_of_the_published_model(name: str, length: int) -> None:
    assert "max_position_embeddings" not in PARAMS[name]
    assert config_from_params(PARAMS[name]).max_length == length
    assert config_from_params({**PARAMS[name], "hidden_dim": 14000}).max_length == 128_000


def test_window_patterns_by_name() -> None:
    config = catalog.find("mistral-7b-v0.1").config
    assert catalog.with_windows(config, "interleaved").windows == (None, 4096, 4096, 4096) * 8
    assert catalog.with_windows(config, "ministral-8b").windows == (None, 32768, 32768, 32768) * 8
    assert catalog.with_windows(config, "full").windows == (None,) * 32
    assert catalog.with_windows(config, [None, 8]).windows == (None, 8) * 16
    assert catalog.with_windows(config, "full").max_length == config.max_length  # no published model
    for name in catalog.WINDOW_PATTERNS:
        catalog.with_windows(config, name)


def test_a_window_pattern_that_does_not_fit_is_refused() -> None:
    windowless = catalog.find("mistral-7b-v0.3").config
    with pytest.raises(ConfigError, match="needs a model with one window width, this one has: none"):
        catalog.with_windows(windowless, "interleaved")
    with pytest.raises(ConfigError, match=r"'zigzag' is not known: expected one of full, interleaved, ministral-8b"):
        catalog.with_windows(windowless, "zigzag")
    with pytest.raises(ConfigError, match="does not tile"):
        catalog.with_windows(windowless, [None, 8, 8])
