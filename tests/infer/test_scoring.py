"""Scoring: log-probabilities against those of all logits at once, whatever the length and the blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer import scoring
from infer.scoring import Score, score
from ministral_jax.errors import RequestError

from .tiny_models import MAX_LENGTH, random_prompts, tiny_model


def logprobs_by_hand(ids: list[int]) -> np.ndarray:
    """[T, V] from the logits of the exact length, softmax in float64."""
    graph, weights = nnx.split(tiny_model())
    logits = jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, jnp.array([ids], jnp.int32))
    logits = np.asarray(logits[0], np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_log_probabilities_and_best_tokens_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that is no bucket, in blocks of which the last is cut off."""
    monkeypatch.setattr(scoring, "LOGITS_BLOCK", 36)
    scoring._compiled.cache_clear()
    (ids,) = random_prompts(70)
    expected = logprobs_by_hand(ids)
    found = score(tiny_model(), ids)
    scoring._compiled.cache_clear()
    assert found.ids == tuple(ids)
    assert found.logprobs[0] is None
    np.testing.assert_allclose(found.logprobs[1:], expected[np.arange(69), ids[1:]], atol=2e-5)
    assert [token for token, _ in found.top] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose([value for _, value in found.top], expected.max(axis=1), atol=2e-5)


def test_a_prefix_scores_as_within_the_whole_and_needs_no_new_program() -> None:
    (ids,) = random_prompts(50)
    whole = score(tiny_model(), ids)
    graph, _ = nnx.split(tiny_model())
    compiled = scoring._compiled(graph)._cache_size()
    for n in (1, 2, 33):
        part = score(tiny_model(), ids[:n])
        np.testing.assert_allclose(part.logprobs[1:], whole.logprobs[1:n], atol=1e-5)
        assert part.logprobs[0] is None
        assert [token for token, _ in part.top] == [token for token, _ in whole.top[:n]]
    assert scoring._compiled(graph)._cache_size() == compiled


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    assert Score((1, 2, 3), (None, -1.0, -3.0), ((1, -0.1),) * 3).perplexity == pytest.approx(np.exp(2.0))
    assert Score((1,), (None,), ((1, -0.1),)).perplexity == 1.0


@pytest.mark.parametrize("n", [1, 63, 64, 65, 96, 97, 1000, 70_000])
def test_at_most_half_of_the_scored_rows_are_padding(n: int) -> None:
    padded = scoring._padded_length(n)
    assert n <= padded
    assert padded == scoring.MIN_LENGTH or padded <= 2 * n
    assert len({scoring._padded_length(i) for i in range(1, 4097)}) <= 13


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids to score: expected at least one"),
        ([1, 314], "token id 314 to score: expected 0 to 313, the model's vocabulary"),
        ([-1], "token id -1 to score"),
        ([1] * (MAX_LENGTH + 1), "129 tokens to score: expected at most 128, the model's context"),
    ],
)
def test_what_cannot_be_scored_is_refused(ids: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        score(tiny_model(), ids)
