"""RoPE: YaRN's frequencies of the published models, rotation as complex multiplication, and the permutation of rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.config import RopeConfig, YarnConfig
from ministral_jax.norm import rms_norm
from ministral_jax.rope import apply_rope, inverse_frequencies, rotation
from ministral_jax.row_order import half_split_rows, interleaved_rows

# Of the published models, computed apart from this project: frequencies 0, 1, low, middle and high of the ramp, last.
YARN = [
    ("Ministral 3 8B", 1e6, 128, 16.0, 16384, (32.0, 1.0), {
        0: 1.0, 1: 0.805842188, 20: 0.0133352143, 28: 0.00132517942, 37: 2.12388021e-5, 63: 7.755861e-8}),
    ("Ministral 3 14B", 1e9, 128, 16.0, 16384, (32.0, 1.0), {
        0: 1.0, 1: 0.723394163, 13: 0.0148550802, 19: 0.00113089932, 25: 1.90657993e-5, 63: 8.63982642e-11}),
    ("Large 3", 1e4, 64, 36.0, 8192, (32.0, 1.0), {
        0: 1.0, 1: 0.749894209, 12: 0.0316227766, 18: 0.00310008679, 25: 2.08303947e-5, 31: 3.7042262e-6}),
    ("Devstral 2", 1e6, 128, 64.0, 4096, (4.0, 1.0), {
        0: 1.0, 1: 0.805842188, 23: 0.00697830585, 27: 0.00149435364, 31: 1.93896525e-5, 63: 1.93896525e-8}),
]  # fmt: skip


@pytest.mark.parametrize(("theta", "head_dim", "factor", "length", "betas", "expected"), [row[1:] for row in YARN])
def test_yarn_frequencies_are_those_of_the_published_models(
    theta: float, head_dim: int, factor: float, length: int, betas: tuple[float, float], expected: dict[int, float]
) -> None:
    yarn = YarnConfig(factor=factor, original_length=length, beta_fast=betas[0], beta_slow=betas[1])
    found = inverse_frequencies(RopeConfig(theta=theta, yarn=yarn), head_dim)
    assert len(found) == head_dim // 2
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=2e-8)


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    """Of native order's adjacent pairs, at absolute positions far out, with YaRN's factor on the result."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 8)).astype(np.float32)  # [T, N, H], pairs adjacent
    positions = np.array([0, 5, 30000])
    yarn = YarnConfig(factor=4.0, original_length=64, beta_fast=4.0, attention_factor=1.3)
    rope = RopeConfig(theta=100.0, yarn=yarn)
    turns = 1.3 * np.exp(1j * positions[:, None] * inverse_frequencies(rope, 8).astype(np.float32))  # [T, H/2]
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None]
    half_split = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    found = apply_rope(jnp.asarray(half_split), *rotation(jnp.asarray(positions, jnp.int32), rope, 8))
    np.testing.assert_allclose(found, np.concatenate([pairs.real, pairs.imag], axis=-1), atol=5e-3)
    np.testing.assert_allclose(found[:2], np.concatenate([pairs.real, pairs.imag], axis=-1)[:2], atol=2e-6)


def test_rows_of_every_head_are_regrouped_and_put_back() -> None:
    """Row 2j + c of a head becomes row c * H/2 + j, for weights and for anything else with one entry per row."""
    rows = np.arange(12)  # two heads of six rows
    assert half_split_rows(rows, 2).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    weight = np.random.default_rng(0).standard_normal((12, 5))
    np.testing.assert_array_equal(half_split_rows(weight, 2), weight[half_split_rows(rows, 2)])
    np.testing.assert_array_equal(interleaved_rows(half_split_rows(weight, 2), 2), weight)
    np.testing.assert_array_equal(half_split_rows(interleaved_rows(weight, 2), 2), weight)


def test_rms_norm_rounds_before_its_weight() -> None:
    """Shown in bfloat16, where the order matters."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((20, 16)), jnp.bfloat16)
    weight = jnp.asarray(1 + 0.1 * rng.standard_normal(16), jnp.bfloat16)
    x64, weight64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    normed = (x64 / np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-5)).astype(jnp.bfloat16)
    expected = (normed.astype(np.float64) * weight64).astype(jnp.bfloat16)
    found = np.asarray(rms_norm(x, weight, 1e-5))
    assert (found == expected).mean() > 0.99
    unrounded = (x64 / np.sqrt((x64**2).mean(axis=-1, keepdims=True) + 1e-5) * weight64).astype(jnp.bfloat16)
    assert (found == unrounded).mean() < 0.95
