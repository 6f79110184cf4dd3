"""Frequencies, rotations, row orders and attention temperature, against formulas written out and transformers' own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ministral_jax import catalog
from ministral_jax.attention import attention_temperature
from ministral_jax.config import ModelConfig, RopeConfig, TemperatureConfig, YarnConfig
from ministral_jax.config_files import config_from_params, hf_from_config
from ministral_jax.rope import apply_rope, half_split_rows, interleaved_rows, inverse_frequencies, rotation
from tests.published_configs import PARAMS

DEVSTRAL_2 = {
    **PARAMS["mistral-7b-v0.3"],
    "dim": 12288,
    "n_layers": 88,
    "hidden_dim": 28672,
    "n_heads": 96,
    "vocab_size": 131072,
    "yarn": {"factor": 64, "original_max_position_embeddings": 4096, "beta": 4, "alpha": 1, "apply_scale": True},
}


def config_of(name: str) -> ModelConfig:
    return config_from_params(DEVSTRAL_2) if name == "devstral-2-123b" else catalog.find(name).config


def rotated_dim(config: ModelConfig) -> int:
    """How much of a head turns."""
    return config.latent.rope_head_dim if config.latent else config.head_dim


# Frequency by pair, float64: the first two, the ends and the middle of the ramp, and the last.
YARN_FREQUENCIES = {
    "ministral-3-3b-base-2512": {
        0: 1, 1: 0.805842188, 20: 0.0133352143, 28: 0.00132517942, 37: 2.12388021e-5, 63: 7.755861e-8,
    },
    "ministral-3-14b-base-2512": {
        0: 1, 1: 0.723394163, 13: 0.0148550802, 19: 0.00113089932, 25: 1.90657993e-5, 63: 8.63982642e-11,
    },
    "mistral-large-3-675b-base-2512": {
        0: 1, 1: 0.749894209, 12: 0.0316227766, 18: 0.00310008679, 25: 2.08303947e-5, 31: 3.7042262e-6,
    },
    "mistral-small-4-119b-instruct-2603": {
        0: 1, 1: 0.749894209, 12: 0.0316227766, 18: 0.00304826848, 25: 5.85854851e-6, 31: 1.04181362e-6,
    },
    "devstral-2-123b": {
        0: 1, 1: 0.805842188, 23: 0.00697830585, 27: 0.00149435364, 31: 1.93896525e-5, 63: 1.93896525e-8,
    },
}  # fmt: skip
YARN_FREQUENCIES["ministral-3-8b-base-2512"] = YARN_FREQUENCIES["ministral-3-3b-base-2512"]


@pytest.mark.parametrize("name", YARN_FREQUENCIES)
def test_yarn_frequencies_are_the_published_ones(name: str) -> None:
    config, expected = config_of(name), YARN_FREQUENCIES[name]
    found = inverse_frequencies(config.rope, rotated_dim(config))
    assert found.shape == (rotated_dim(config) // 2,)
    np.testing.assert_allclose(found[list(expected)], list(expected.values()), rtol=5e-9)


@pytest.mark.parametrize("name", YARN_FREQUENCIES)
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between(name: str) -> None:
    config = config_of(name)
    assert config.rope.yarn
    plain = inverse_frequencies(RopeConfig(theta=config.rope.theta), rotated_dim(config))
    ratio = inverse_frequencies(config.rope, rotated_dim(config)) / plain
    low, high = list(YARN_FREQUENCIES[name])[2], list(YARN_FREQUENCIES[name])[4]
    np.testing.assert_allclose(ratio[: low + 1], 1.0)
    np.testing.assert_allclose(ratio[high:], 1 / config.rope.yarn.factor)
    assert (np.diff(ratio[low : high + 1]) < 0).all()


def test_the_attention_factor_is_1_where_scale_is_not_applied() -> None:
    factors = {name: config_of(name).rope.yarn for name in YARN_FREQUENCIES}
    scaled = {name for name, yarn in factors.items() if yarn and yarn.attention_factor != 1.0}
    assert scaled == {"devstral-2-123b"}
    devstral = factors["devstral-2-123b"]
    assert devstral
    assert devstral.attention_factor == pytest.approx(1.415888, abs=5e-7)


def test_plain_frequencies_fall_by_a_constant_ratio() -> None:
    frequencies = inverse_frequencies(RopeConfig(theta=1e4), 128)
    assert frequencies[0] == 1.0
    np.testing.assert_allclose(frequencies[1:] / frequencies[:-1], 1e4 ** (-2 / 128))


POSITIONS = [0, 1, 511, 4096, 16383, 16384, 131072]


@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "ministral-3-14b-base-2512", "devstral-2-123b"])
def test_cosine_and_sine_are_of_position_times_frequency(name: str) -> None:
    config = config_of(name)
    positions = np.array(POSITIONS, np.int32)
    cos, sin = rotation(jnp.asarray(positions), config.rope, config.head_dim)
    assert cos.dtype == sin.dtype == jnp.float32
    frequencies = inverse_frequencies(config.rope, config.head_dim).astype(np.float32)
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)  # rounded as float32 rounds
    factor = config.rope.yarn.attention_factor if config.rope.yarn else 1.0
    np.testing.assert_allclose(cos, factor * np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin, factor * np.sin(angles), atol=2e-6)


def test_batched_positions_turn_as_single_ones_do() -> None:
    rope = RopeConfig(theta=1e4)
    cos, sin = rotation(jnp.array([[3, 9], [9, 1]], jnp.int32), rope, 8)
    alone = rotation(jnp.array([9], jnp.int32), rope, 8)
    assert cos.shape == sin.shape == (2, 2, 4)
    np.testing.assert_array_equal(cos[0, 1], alone[0][0])
    np.testing.assert_array_equal(sin[1, 0], alone[1][0])


def turned_as_complex_numbers(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Mistral's own form, float64: adjacent numbers of each head [T, N, H] are one complex number, which is turned."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * positions[:, None] * frequencies)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def memory_order(heads: np.ndarray) -> np.ndarray:
    """The last axis from mistral order to memory order, one head at a time."""
    return np.concatenate([heads[..., 0::2], heads[..., 1::2]], axis=-1)


def test_half_split_rotation_of_permuted_heads_is_the_complex_rotation() -> None:
    draw = np.random.default_rng(0)
    positions = np.array([0, 1, 17, 300])
    rope = RopeConfig(theta=1e4, yarn=YarnConfig(factor=4.0, original_length=64, attention_factor=1.5))
    x = draw.normal(size=(4, 3, 16))
    expected = 1.5 * memory_order(turned_as_complex_numbers(x, positions, inverse_frequencies(rope, 16)))
    cos, sin = rotation(jnp.asarray(positions, jnp.int32), rope, 16)
    found = apply_rope(jnp.asarray(memory_order(x), jnp.float32), cos, sin)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_scores_depend_on_distance_alone() -> None:
    draw = np.random.default_rng(1)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 32)), jnp.float32) for _ in range(2))
    rope = RopeConfig(theta=1e4)

    def score(query: int, key: int) -> float:
        turned = [
            apply_rope(x, *rotation(jnp.array([position], jnp.int32), rope, 32))
            for x, position in ((q, query), (k, key))
        ]
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotation_keeps_the_dtype_and_rounds_once() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 1, 8)), jnp.bfloat16)
    cos, sin = rotation(jnp.array([5, 70], jnp.int32), RopeConfig(theta=1e4), 8)
    exact = apply_rope(x.astype(jnp.float32), cos, sin)
    found = apply_rope(x, cos, sin)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("columns", [(), (1,), (5,), (3, 2)])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_a_row_of_a_head_moves_as_the_formula_says(columns: tuple[int, ...], as_array) -> None:
    n_heads, d = 3, 8
    native = np.arange(n_heads * d * int(np.prod(columns))).reshape(n_heads * d, *columns)
    found = half_split_rows(as_array(native), n_heads)
    for head in range(n_heads):
        for j in range(d // 2):
            for c in range(2):
                expected = native[head * d + 2 * j + c]
                np.testing.assert_array_equal(found[head * d + c * d // 2 + j], expected)


@given(n_heads=st.integers(1, 8), half=st.integers(1, 16), columns=st.integers(1, 4))
def test_the_two_row_orders_are_inverses(n_heads: int, half: int, columns: int) -> None:
    rows = np.random.default_rng(0).normal(size=(n_heads * 2 * half, columns))
    np.testing.assert_array_equal(interleaved_rows(half_split_rows(rows, n_heads), n_heads), rows)
    np.testing.assert_array_equal(half_split_rows(interleaved_rows(rows, n_heads), n_heads), rows)


@pytest.mark.parametrize(("periods", "factor"), [(0, 1.0), (1, 1.0693147), (3, 1.1386294), (15, 1.2772589)])
@pytest.mark.parametrize("length", [8192, 16384])
def test_attention_temperature_steps_at_multiples_of_the_original_length(
    periods: int, factor: float, length: int
) -> None:
    temperature = TemperatureConfig(beta=0.1, original_length=length)
    first, last = periods * length, (periods + 1) * length - 1
    found = attention_temperature(jnp.array([first, last], jnp.int32), temperature)
    np.testing.assert_allclose(found, [factor, factor], rtol=2e-7)


def test_attention_temperature_is_exactly_1_within_the_original_length() -> None:
    temperature = TemperatureConfig(beta=0.1, original_length=16384)
    found = attention_temperature(jnp.array([0, 1, 16383], jnp.int32), temperature)
    assert (found == 1.0).all()


def hf_text_config(config: ModelConfig):
    """transformers' config object of the text decoder alone."""
    from transformers import AutoConfig

    text = dataclasses.replace(config, vision=None, quantization=None)
    return AutoConfig.for_model(**hf_from_config(text))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "ministral-8b-2410", "mixtral-8x22b-v0.3", *YARN_FREQUENCIES])
def test_cosine_and_sine_equal_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding

    config = config_of(name)
    positions = np.array([[0, 1, 2, 100, 1000, 4000]])
    embedding = Ministral3RotaryEmbedding(hf_text_config(config))
    expected = embedding(torch.zeros(1), torch.from_numpy(positions))
    found = rotation(jnp.asarray(positions[0], jnp.int32), config.rope, rotated_dim(config))
    for ours, theirs in zip(found, expected, strict=True):
        half = theirs[0, :, : rotated_dim(config) // 2].numpy()  # the other half repeats it
        # a frequency of theirs is a float32 result: at position 4000 its last bit is 5e-4 of an angle
        np.testing.assert_allclose(ours, half, atol=2e-3)
        np.testing.assert_allclose(ours[:3], half[:3], atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", YARN_FREQUENCIES)
def test_yarn_frequencies_equal_those_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = config_of(name)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](hf_text_config(config), None)
    np.testing.assert_allclose(inverse_frequencies(config.rope, rotated_dim(config)), frequencies.numpy(), rtol=1e-5)
    assert config.rope.yarn
    assert factor == pytest.approx(config.rope.yarn.attention_factor, rel=1e-12)


@pytest.mark.parity
def test_rotated_queries_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.ministral3.modeling_ministral3 import apply_rotary_pos_emb

    draw = np.random.default_rng(3)
    x = draw.normal(size=(5, 4, 16)).astype(np.float32)  # [T, N, H]
    cos, sin = rotation(jnp.array([0, 3, 50, 51, 200], jnp.int32), RopeConfig(theta=1e4), 16)
    doubled = [torch.from_numpy(np.concatenate([half, half], axis=-1))[None] for half in (cos, sin)]
    heads_first = torch.from_numpy(x.swapaxes(0, 1))[None]
    expected = apply_rotary_pos_emb(heads_first, heads_first, *doubled)[0][0].numpy().swapaxes(0, 1)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), cos, sin), expected, atol=1e-6)


@pytest.mark.parity
def test_attention_temperature_equals_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    positions = np.array([0, 1, 16383, 16384, 16385, 49152, 131072, 262143])
    expected = get_llama_4_attn_scale(torch.from_numpy(positions[None]), 0.1, 16384).numpy().ravel()
    temperature = TemperatureConfig(beta=0.1, original_length=16384)
    found = attention_temperature(jnp.asarray(positions, jnp.int32), temperature)
    np.testing.assert_allclose(found, expected, rtol=2e-7)
