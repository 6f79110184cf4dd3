"""The decoder: scoring at once, in chunks and token by token are one function; windows, segments, the tied head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ministral_jax.attention import attention_temperature
from ministral_jax.config import ModelConfig, RopeConfig, TemperatureConfig, Window, YarnConfig
from ministral_jax.parameters import initialize, parameters
from ministral_jax.transformer import Transformer

from .paged_runner import PagedRunner, jitted

VOCAB, LENGTH, ORIGINAL, ROWS = 40, 48, 16, 16
CLOSE = 1e-5  # of the range of the logits


def config(*windows: Window, tied: bool = False) -> ModelConfig:
    """Tiny, with YaRN and a strong temperature: LENGTH is three of their original lengths."""
    yarn = YarnConfig(factor=4.0, original_length=ORIGINAL, beta_fast=2.0, beta_slow=0.5, attention_factor=1.1)
    return ModelConfig(
        dim=24,
        n_layers=len(windows),
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=32,
        vocab_size=VOCAB,
        norm_eps=1e-5,
        rope=RopeConfig(theta=100.0, yarn=yarn),
        windows=windows,
        max_length=LENGTH,
        tied_embeddings=tied,
        temperature=TemperatureConfig(beta=0.5, original_length=ORIGINAL),
    )


def filled(config: ModelConfig) -> Transformer:
    return initialize(Transformer(config), jax.random.key(7), std=0.3)


@functools.cache
def every_window() -> Transformer:
    """A layer for each kind of window: none, one token, less than a page of 4, a page, several, more than the text."""
    return filled(config(None, 1, 3, 4, 11, 100))


@functools.cache
def one_shot(model: Transformer) -> Callable[..., jax.Array]:
    return jitted(model, lambda model, tokens: model(tokens))


@functools.cache
def runner(page_size: int) -> PagedRunner:
    return PagedRunner(every_window(), batch=3, rows=ROWS, length=LENGTH, page_size=page_size)


def scored(model: Transformer, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of whole sequences, padded at the end to one compiled shape."""
    padded = np.stack([np.pad(sequence, (0, LENGTH - len(sequence))) for sequence in sequences]).astype(np.int32)
    logits = np.asarray(one_shot(model)(jnp.asarray(padded)))
    return [row[: len(sequence)] for row, sequence in zip(logits, sequences, strict=True)]


def random_sequences(seed: int, lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


def assert_same_logits(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    allowed = CLOSE * max(float(np.ptp(logits)) for logits in want)
    for one, other in zip(got, want, strict=True):
        assert np.abs(one - other).max() <= allowed


@pytest.mark.parametrize("page_size", [4, 16])
@settings(max_examples=12)
@given(data=st.data())
def test_chunks_of_any_size_and_single_tokens_give_the_logits_of_one_shot(page_size: int, data: st.DataObject) -> None:
    """Ragged batches over every kind of window and past two original lengths, from a cache full of NaN."""
    lengths = data.draw(st.lists(st.integers(1, LENGTH), min_size=3, max_size=3))
    sequences = random_sequences(sum(lengths), lengths)
    sizes = data.draw(st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 5, 16])] * 3), max_size=12))
    rest = [(ROWS, ROWS, ROWS)] * math.ceil(sum(lengths) / ROWS + 3)
    assert_same_logits(runner(page_size).run(sequences, [*sizes, *rest]), scored(every_window(), sequences))


def test_token_by_token_gives_the_logits_of_one_shot() -> None:
    sequences = random_sequences(1, [LENGTH, 20, 5])
    assert_same_logits(runner(4).run(sequences, [(1, 1, 1)] * LENGTH), scored(every_window(), sequences))


def test_what_else_is_in_the_batch_changes_nothing() -> None:
    """Alone in the batch, or beside others: the same numbers to the last rounding."""
    sequences = random_sequences(2, [30, 17, 41])
    schedule = [(5, 6, 5)] * 9
    together = runner(4).run(sequences, schedule)
    alone = runner(4).run(sequences[:1], schedule)
    assert_same_logits(alone, together[:1])


def test_packed_segments_equal_separate_sequences() -> None:
    sequences = random_sequences(3, [20, 5, 23])
    positions = np.concatenate([np.arange(len(s)) for s in sequences])[None].astype(np.int32)
    segments = np.repeat([0, 1, 2], [len(s) for s in sequences])[None].astype(np.int32)
    packed = jitted(every_window(), lambda model, *arrays: model.logits(model.hidden(*arrays)))
    logits = np.asarray(packed(np.concatenate(sequences)[None], positions, segments))[0]
    assert_same_logits(np.split(logits, np.cumsum([20, 5])), scored(every_window(), sequences))


@settings(max_examples=10)
@given(at=st.integers(5, LENGTH - 1), seed=st.integers(0, 1000))
def test_window_hides_keys_older_than_w(at: int, seed: int) -> None:
    """In a single layer a token moves the logits of the W - 1 after it, and of no other."""
    window = 5
    model = single_layer(window)
    (tokens,) = random_sequences(seed, [LENGTH])
    changed = tokens.copy()
    changed[at - window] = (changed[at - window] + 1) % VOCAB
    moved = np.abs(scored(model, [tokens])[0] - scored(model, [changed])[0]).max(axis=1)
    assert np.all(moved[at - window : at] > 1e-4)
    assert np.all(moved[at:] == 0)
    assert np.all(moved[: at - window] == 0)


@functools.cache
def single_layer(window: int) -> Transformer:
    return filled(config(window))


def test_stacked_windows_reach_further_than_one() -> None:
    """Two layers of window W reach 2W - 1 tokens: what lies beyond is hidden for good."""
    model = filled(config(4, 4))
    (tokens,) = random_sequences(4, [LENGTH])
    changed = tokens.copy()
    changed[10] = (changed[10] + 1) % VOCAB
    moved = np.abs(scored(model, [tokens])[0] - scored(model, [changed])[0]).max(axis=1)
    assert np.flatnonzero(moved).tolist() == list(range(10, 10 + 2 * 4 - 1))


def test_a_tied_head_is_the_embedding_and_has_no_weight_of_its_own() -> None:
    tied, untied = filled(config(None, tied=True)), filled(config(None))
    assert parameters(untied).keys() - parameters(tied).keys() == {"output.weight"}
    hidden = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    embedding = np.asarray(parameters(tied)["tok_embeddings.weight"])
    np.testing.assert_allclose(tied.logits(jnp.asarray(hidden)), hidden @ embedding.T, rtol=1e-5, atol=1e-5)
    head = np.asarray(parameters(untied)["output.weight"])
    np.testing.assert_allclose(untied.logits(jnp.asarray(hidden)), hidden @ head.T, rtol=1e-5, atol=1e-5)


def test_temperature_steps_at_multiples_of_the_original_length() -> None:
    """`1 + beta * ln(1 + floor(p / L0))` of the position, not of the position plus one; exactly 1 within L0."""
    temperature = TemperatureConfig(beta=0.1, original_length=16384)
    positions = [0, 16383, 16384, 32767, 32768, 3 * 16384, 15 * 16384]
    found = attention_temperature(jnp.array(positions, jnp.int32), temperature)
    expected = [1.0, 1.0, 1.0693147, 1.0693147, 1.1098612, 1.1386294, 1.2772589]
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert found[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "begins"),
    [({"windows": (None, 4)}, 4), ({"temperature": None}, ORIGINAL)],
    ids=["window", "temperature"],
)
def test_a_part_of_the_config_matters_from_where_it_begins(changes: dict[str, Any], begins: int) -> None:
    """The same weights with one window more, or without temperature, answer differently from that position on."""
    base = config(None, None)
    (tokens,) = random_sequences(5, [LENGTH])
    plain = scored(filled(base), [tokens])[0]
    other = scored(filled(dataclasses.replace(base, **changes)), [tokens])[0]
    moved = np.abs(plain - other).max(axis=1)
    assert np.all(moved[begins:] > 1e-4)
    assert np.all(moved[:begins] <= CLOSE * np.ptp(plain))
