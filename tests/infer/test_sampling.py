"""Choosing tokens: every knob against its formula written out in numpy, one sequence at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.sampling import (
    History,
    SamplingParams,
    batch_arrays,
    batch_mode,
    choose,
    kept_tokens,
    penalise,
    record,
    start_history,
)
from ministral_jax.errors import RequestError

V = 10
jitted_kept = jax.jit(kept_tokens)
jitted_choose = jax.jit(choose, static_argnames=("mode",))
logit_rows = st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 0.5, 2.0, 3.0]), min_size=V, max_size=V)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kept_by_hand(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Ranks tokens by logit, ties by id, and drops from the end: first beyond k, then beyond p, then below min-p."""
    ranked = sorted(range(V), key=lambda token: (-logits[token], token))
    if top_k:
        ranked = ranked[:top_k]
    probs = softmax(logits[ranked])
    kept, mass = [], 0.0
    for token, prob in zip(ranked, probs, strict=True):
        if top_p < 1.0 and mass >= top_p and kept:
            break
        kept.append((token, prob))
        mass += prob
    return {token for token, prob in kept if prob >= min_p * probs[0]}


@settings(max_examples=80)
@given(
    logits=logit_rows,
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.01, 0.33, 0.61, 0.87, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.023, 0.3, 0.9, 1.0]),
)
def test_top_k_top_p_and_min_p_keep_what_their_formulas_keep(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    """Equal logits are common here: a tie at the border of k or p goes to the lower id."""
    row = np.array(logits)
    arrays = batch_arrays([SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)])
    kept = np.asarray(jitted_kept(jnp.asarray(row[None], jnp.float32), arrays))[0]
    assert set(np.flatnonzero(kept).tolist()) == kept_by_hand(row, top_k, top_p, min_p)


@pytest.mark.parametrize(
    ("knob", "kept"),
    [
        ({"top_k": 2}, {3, 5}),
        ({"top_p": 0.5}, {5}),
        ({"top_p": 0.7}, {3, 5}),
        ({"min_p": 0.35}, {3, 5}),
        ({"min_p": 0.2}, {0, 3, 5}),
        ({"top_k": 3, "top_p": 0.7}, {3, 5}),
        ({}, set(range(6))),
    ],
)
def test_each_knob_on_probabilities_one_can_read(knob: dict[str, Any], kept: set[int]) -> None:
    probs = np.array([0.12, 0.01, 0.02, 0.25, 0.05, 0.55])
    arrays = batch_arrays([SamplingParams(temperature=1.0, seed=0, **knob)])
    found = np.asarray(jitted_kept(jnp.log(jnp.asarray(probs, jnp.float32))[None], arrays))[0]
    assert set(np.flatnonzero(found).tolist()) == kept


def penalised_by_hand(logits: np.ndarray, params: SamplingParams, prompt: list[int], answer: list[int]) -> np.ndarray:
    out = logits.copy()
    for token in range(V):
        if token in prompt or token in answer:
            rep = params.repetition_penalty
            out[token] = out[token] / rep if out[token] > 0 else out[token] * rep
        out[token] -= params.frequency_penalty * answer.count(token)
        out[token] -= params.presence_penalty * (token in answer)
    return out


@settings(max_examples=30)
@given(
    logits=logit_rows,
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=4),
    answer=st.lists(st.integers(0, V - 1), max_size=6),
    repetition=st.sampled_from([0.7, 1.0, 1.5]),
    presence=st.sampled_from([-0.5, 0.0, 0.8]),
    frequency=st.sampled_from([-0.3, 0.0, 0.6]),
)
def test_penalties_are_their_formulas(
    logits: list[float], prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float
) -> None:
    """Repetition counts prompt and answer; presence and frequency the answer alone."""
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, seed=0
    )
    mode = batch_mode([params])._replace(penalised=True)
    history = start_history([prompt], V, mode)
    for token in answer:
        history = record(history, jnp.array([token]), jnp.array([True]), mode)
    history = record(history, jnp.array([0]), jnp.array([False]), mode)
    row = np.array(logits)
    found = penalise(jnp.asarray(row[None], jnp.float32), batch_arrays([params]), history)
    np.testing.assert_allclose(found[0], penalised_by_hand(row, params, prompt, answer), rtol=1e-6, atol=1e-6)


def draw(logits: np.ndarray, params: list[SamplingParams], produced: list[int] | None = None) -> np.ndarray:
    rows = np.broadcast_to(logits, (len(params), logits.shape[-1]))
    mode, at = batch_mode(params), jnp.asarray(produced or [0] * len(params), jnp.int32)
    choice = jitted_choose(
        jnp.asarray(rows, jnp.float32), batch_arrays(params), start_history([[0]] * len(params), V, mode), at, mode=mode
    )
    return np.asarray(choice.tokens)


@pytest.mark.parametrize("produced", [0, 7])
def test_draws_follow_the_filtered_tempered_distribution(produced: int) -> None:
    """Chi-square over 4000 seeds, four degrees of freedom: chance alone passes 18.5 once in 1000."""
    logits = np.array([0.3, -1.0, 2.0, 1.5, 0.0, -2.0, 1.0, 0.9, -0.5, -3.0])
    n, kept = 4000, np.argsort(-logits)[:5]
    params = [SamplingParams(temperature=0.7, top_k=5, seed=seed) for seed in range(n)]
    counts = np.bincount(draw(logits, params, [produced] * n), minlength=V)
    assert counts.sum() == counts[kept].sum() == n
    probs = softmax(logits[kept] / 0.7)
    assert ((counts[kept] - n * probs) ** 2 / (n * probs)).sum() < 18.5


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = np.linspace(-1, 1, V)
    mine = SamplingParams(temperature=1.3, seed=42)
    others = [SamplingParams(temperature=0.5, top_p=0.5, seed=seed) for seed in range(20)]
    alone = [draw(logits, [mine], [step])[0] for step in range(12)]
    among = [draw(logits, [*others, mine], [3] * 20 + [step])[20] for step in range(12)]
    assert alone == among
    assert len(set(alone)) > 2
    assert alone != [draw(logits, [SamplingParams(temperature=1.3, seed=43)], [step])[0] for step in range(12)]


def test_sequences_without_a_seed_differ() -> None:
    tokens = draw(np.zeros(V), [SamplingParams(temperature=1.0)] * 40)
    assert len(set(tokens.tolist())) > 3


def test_temperature_zero_takes_the_likeliest_beside_sequences_that_draw() -> None:
    logits = np.array([0.0, 0.1, 0.2, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.25])
    params = [SamplingParams(), SamplingParams(temperature=2.0, seed=1), SamplingParams()]
    assert draw(logits, params)[[0, 2]].tolist() == [5, 5]


def test_log_probabilities_are_the_models_own_before_penalties_and_temperature() -> None:
    logits = np.random.default_rng(0).standard_normal((1, V)).astype(np.float32)
    params = [SamplingParams(temperature=0.1, top_k=1, presence_penalty=2.0, seed=0, logprobs=4)]
    mode = batch_mode(params)
    history = record(start_history([[0]], V, mode), jnp.array([int(logits.argmax())]), jnp.array([True]), mode)
    choice = jitted_choose(jnp.asarray(logits), batch_arrays(params), history, jnp.array([1]), mode=mode)
    expected = np.log(softmax(logits[0].astype(np.float64)))
    assert int(choice.tokens[0]) != int(logits.argmax()), "the penalty should have decided"
    assert float(choice.logprobs[0]) == pytest.approx(expected[int(choice.tokens[0])], abs=1e-6)
    assert choice.top_ids[0].tolist() == np.argsort(-expected)[:4].tolist()
    np.testing.assert_allclose(choice.top_logprobs[0], np.sort(expected)[::-1][:4], atol=1e-6)


def test_a_batch_that_asks_for_nothing_carries_no_history() -> None:
    assert batch_mode([SamplingParams()]) == (False, False, False, None)
    assert start_history([[1, 2]], V, batch_mode([SamplingParams()])).counts.shape == (1, 0)
    assert isinstance(start_history([[1]], V, batch_mode([SamplingParams(presence_penalty=1.0)])), History)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("seed", 2**32),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("stop", ("",)),
        ("logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field}=.* is not allowed: expected "):
        SamplingParams(**{field: value})
