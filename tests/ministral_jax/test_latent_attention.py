"""Latent attention: the published formula in float64, and a cache of latents that gives the same answers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ministral_jax.cache import allocate_cache, plan_cache
from ministral_jax.catalog import find
from ministral_jax.config import (
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    TemperatureConfig,
    YarnConfig,
)
from ministral_jax.latent_attention import LatentAttention
from ministral_jax.lora import LoraConfig, attach
from ministral_jax.memory import plan_memory
from ministral_jax.parameters import fill, initialize, parameter_specs, parameters
from ministral_jax.stacked import StackedTransformer
from ministral_jax.transformer import Transformer
from pallas_kernels.dispatch import Target

from .paged_runner import PagedRunner, jitted

VOCAB, LENGTH, ORIGINAL, ROWS = 40, 48, 16, 16
CLOSE = 1e-5  # of the range

LATENT = LatentAttentionConfig(q_rank=20, kv_rank=12, rope_head_dim=8, nope_head_dim=6, v_head_dim=10)
YARN = YarnConfig(factor=4.0, original_length=ORIGINAL, beta_fast=2.0, beta_slow=0.5)


def config(*, latent: LatentAttentionConfig = LATENT, n_layers: int = 3) -> ModelConfig:
    """Large 3 in small: a dense layer, then experts with a shared one; LENGTH is three original lengths."""
    return ModelConfig(
        dim=24,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=4,
        head_dim=latent.nope_head_dim + latent.rope_head_dim,
        hidden_dim=32,
        vocab_size=VOCAB,
        norm_eps=1e-6,
        rope=RopeConfig(theta=100.0, yarn=YARN),
        windows=(None,) * n_layers,
        max_length=LENGTH,
        temperature=TemperatureConfig(beta=0.5, original_length=ORIGINAL),
        moe=MoEConfig(n_experts=4, experts_per_token=2, expert_hidden_dim=16, n_shared_experts=1, first_dense_layers=1),
        latent=latent,
    )


@functools.cache
def model() -> Transformer:
    return initialize(Transformer(config()), jax.random.key(7), std=0.3)


@functools.cache
def runner() -> PagedRunner:
    return PagedRunner(model(), batch=3, rows=ROWS, length=LENGTH, page_size=4)


def random_sequences(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


def scored(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Logits in the expanded form, of whole sequences."""
    padded = np.stack([np.pad(sequence, (0, LENGTH - len(sequence))) for sequence in sequences])
    logits = np.asarray(one_shot()(jnp.asarray(padded)))
    return [row[: len(sequence)] for row, sequence in zip(logits, sequences, strict=True)]


@functools.cache
def one_shot() -> Callable[..., jax.Array]:
    return jitted(model(), lambda model, tokens: model(tokens))


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    allowed = CLOSE * max(float(np.ptp(logits)) for logits in expected)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= allowed


@settings(max_examples=8)
@given(data=st.data())
def test_chunks_and_single_tokens_over_latents_give_the_logits_of_one_shot(data: st.DataObject) -> None:
    """Absorbed against expanded, ragged, past two original lengths of YaRN and of the temperature, from NaN pools."""
    lengths = data.draw(st.lists(st.integers(1, LENGTH), min_size=3, max_size=3))
    sequences = random_sequences(lengths)
    sizes = data.draw(st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 5, 16])] * 3), max_size=12))
    rest = [(ROWS, ROWS, ROWS)] * math.ceil(sum(lengths) / ROWS + 3)
    assert_same(runner().run(sequences, [*sizes, *rest]), scored(sequences))


def test_token_by_token_over_latents_gives_the_logits_of_one_shot() -> None:
    sequences = random_sequences([LENGTH, 20, 5])
    assert_same(runner().run(sequences, [(1, 1, 1)] * LENGTH), scored(sequences))


def test_layers_stacked_for_training_are_the_same_model() -> None:
    """A dense layer before the stack, then latent attention and experts with an axis of layers in front."""
    (sequence,) = random_sequences([LENGTH])
    again = fill(Transformer(config()), parameters(model()))
    stacked = StackedTransformer(again, remat="none")
    found = jitted(stacked, lambda stacked, tokens: stacked.logits(stacked.hidden(tokens)))  # type: ignore[arg-type]
    assert_same([np.asarray(found(jnp.asarray(sequence[None])))[0]], scored([sequence]))


def turned(pairs: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Adjacent numbers as complex ones, times e^(i angle): YaRN's frequencies by the formulas of the paper."""
    d, theta, s, length = LATENT.rope_head_dim, 100.0, YARN.factor, ORIGINAL

    def pair_that_turns(times: float) -> float:
        return d * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(YARN.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(YARN.beta_slow)), d - 1)
    plain = theta ** (-np.arange(0, d, 2) / d)
    ramp = np.clip((np.arange(d // 2) - low) / max(high - low, 0.001), 0, 1)
    frequencies = plain / s * ramp + plain * (1 - ramp)
    turn = np.exp(1j * positions[:, None] * frequencies)  # [T, d/2]
    turn = turn.reshape(len(positions), *[1] * (pairs.ndim - 2), d // 2)
    numbers = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * turn
    return np.stack([numbers.real, numbers.imag], axis=-1).reshape(pairs.shape)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def formula(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One layer's attention of [T, D] in float64: queries, the latent and its key, temperature, plain scale."""
    T, N, m = len(x), 4, LATENT
    positions = np.arange(T)
    q = (rms(x @ w["wq_a.weight"].T, w["q_a_norm.weight"]) @ w["wq_b.weight"].T).reshape(T, N, -1)
    q = np.concatenate([q[..., : m.nope_head_dim], turned(q[..., m.nope_head_dim :], positions)], axis=-1)
    q *= (1 + 0.5 * np.log(1 + positions // ORIGINAL))[:, None, None]
    both = x @ w["wkv_a_with_mqa.weight"].T
    k_rope = turned(both[:, m.kv_rank :], positions)
    kv = (rms(both[:, : m.kv_rank], w["kv_a_norm.weight"]) @ w["wkv_b.weight"].T).reshape(T, N, -1)
    k = np.concatenate([kv[..., : m.nope_head_dim], np.repeat(k_rope[:, None], N, axis=1)], axis=-1)
    scores = np.einsum("tnh,snh->nts", q, k) * (m.nope_head_dim + m.rope_head_dim) ** -0.5
    scores = np.where(positions[:, None] >= positions, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("nts,snv->tnv", shares, kv[..., m.nope_head_dim :])
    return mixed.reshape(T, -1) @ w["wo.weight"].T


def test_a_layer_is_the_published_formula() -> None:
    """Interleaved pairs in the rope part, softmax scale of the whole head alone, temperature over all of q."""
    attention = model().layers[0].attention
    assert isinstance(attention, LatentAttention)
    weights = {name: np.asarray(array, np.float64) for name, array in parameters(attention).items()}
    x = np.random.default_rng(0).standard_normal((LENGTH, 24)).astype(np.float32)

    def of_layer(model: Transformer, x: jax.Array) -> jax.Array:
        from ministral_jax.attend import causal_attend
        from ministral_jax.attention import Rotation

        positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        attend = causal_attend(model.config, None, "reference", None)
        rotation = Rotation.at(positions, model.config)
        return model.layers[0].attention(x[None], rotation, 0, attend, None)[0][0]

    found = np.asarray(jitted(model(), of_layer)(jnp.asarray(x)))
    expected = formula(weights, x.astype(np.float64))
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


def test_a_token_costs_the_cache_its_latent_and_one_rotated_key() -> None:
    """Large 3: 576 numbers for each of 61 layers; what is planned is what is allocated."""
    small = config()
    plan = plan_cache(small, batch=2, length=LENGTH, chunk=8, page_size=4, dtype=jnp.dtype(jnp.float32))
    cache = allocate_cache(small, plan, jnp.dtype(jnp.float32))
    assert cache.n_bytes == plan.n_bytes == 3 * (2 * LENGTH // 4 + 1) * 4 * (12 + 8) * 4
    assert cache.values == (None,) * 3
    large = find("mistral-large-3-675b-base-2512").config
    assert plan_memory(large, length=64, page_size=64).cache_bytes == 61 * 576 * 2 * 2 * 64  # and a null page


def test_entries_filled_up_for_a_tpu_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 128 numbers for 20 that are kept; what lies behind them was NaN before it was written."""
    monkeypatch.setattr("ministral_jax.cache.target", lambda: Target("tpu", "TPU v6 lite"))
    wide = PagedRunner(model(), batch=3, rows=ROWS, length=LENGTH, page_size=4)
    assert wide.plan.n_bytes == 128 * runner().plan.n_bytes // 20
    sequences = random_sequences([LENGTH, 20, 5])
    assert_same(wide.run(sequences, [(9, 5, 1)] * 6), scored(sequences))


@pytest.mark.long
def test_an_adapter_acts_in_both_forms() -> None:
    """wkv_b too, which the absorbed form takes apart."""
    adapted = Transformer(dataclasses.replace(config(n_layers=1), moe=None))
    base = initialize(adapted, jax.random.key(1), std=0.3)
    arrays = dict(parameters(base))
    attach(adapted, LoraConfig(targets=("wo",), rank=2))
    adapted.layers[0].attention.wkv_b.adapt(adapted.layers[0].attention.wo.adapter)
    rng = np.random.default_rng(0)
    lora = {n: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32)
            for n, s in parameter_specs(adapted).items() if "lora" in n}  # fmt: skip
    assert len(lora) == 4
    filled = fill(adapted, arrays | lora)
    (sequence,) = random_sequences([LENGTH])
    expanded = np.asarray(jitted(filled, lambda model, tokens: model(tokens))(jnp.asarray(sequence[None])))[0]
    paged = PagedRunner(filled, batch=1, rows=ROWS, length=LENGTH, page_size=4)
    assert_same(paged.run([sequence], [(7,)] * 7), [expanded])
    plain = np.asarray(jitted(base, lambda model, tokens: model(tokens))(jnp.asarray(sequence[None])))[0]
    assert np.abs(expanded - plain).max() > 1e-2 * np.ptp(plain)
