"""Scoring: the log-probability of every token of a sequence, holding the logits of one block of positions at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ministral_jax.errors import RequestError
from ministral_jax.transformer import Transformer
from ministral_jax.vision_adapter import ImageRows

from .images import Images, prompt_rows, text_alone

LOGITS_BLOCK = 256  # positions whose logits are held at once: 134 MB in float32 at a vocabulary of 131072
MIN_LENGTH = 64


@dataclass(frozen=True)
class Score:
    """Natural log-probabilities of a sequence.

    `logprobs[i]` is that of `ids[i]` given the ids before it, None for the first. `top[i]` is the likeliest next
    token after `ids[i]` with its log-probability.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[int, float], ...]

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability of all ids but the first; 1.0 for a single id."""
        known = [value for value in self.logprobs if value is not None]
        return float(np.exp(-np.mean(known))) if known else 1.0


def score(model: Transformer, ids: Sequence[int], images: Images = ()) -> Score:
    """Scores token ids in one pass over the sequence; no bos is added. `images` are those of its image tokens.

    Raises RequestError for no ids, ids outside the vocabulary, more than the model's context, or other images.
    """
    _check(model, ids)
    graph, weights = nnx.split(text_alone(model))
    # Padded to few lengths, so that few programs are compiled; causality keeps the padding out of the result.
    length = _padded_length(len(ids))
    padded = np.zeros(length, np.int32)
    padded[: len(ids)] = ids
    rows = prompt_rows(model, ids, images, length) if len(images) else None
    logprobs, top_ids, top = jax.device_get(_compiled(graph)(weights, jnp.asarray(padded), rows))
    n = len(ids)
    return Score(
        ids=tuple(int(i) for i in ids),
        logprobs=(None, *logprobs[: n - 1].tolist()),
        top=tuple(zip(top_ids[:n].tolist(), top[:n].tolist(), strict=True)),
    )


def _check(model: Transformer, ids: Sequence[int]) -> None:
    vocab, limit = model.config.vocab_size, model.config.max_length
    if not len(ids):
        raise RequestError("no token ids to score: expected at least one")
    if len(ids) > limit:
        raise RequestError(f"{len(ids)} tokens to score: expected at most {limit}, the model's context")
    outside = next((i for i in ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise RequestError(f"token id {outside} to score: expected 0 to {vocab - 1}, the model's vocabulary")


def _padded_length(n: int) -> int:
    """The next power of two or one and a half of one: at most half of the work is padding."""
    power = max(MIN_LENGTH, 1 << (n - 1).bit_length())
    return power * 3 // 4 if n <= power * 3 // 4 and power > MIN_LENGTH else power


@functools.lru_cache(maxsize=16)
def _compiled(graph: Any) -> Any:
    return jax.jit(functools.partial(_score, graph))


def _score(graph: Any, weights: Any, ids: Int[Array, "T"], images: ImageRows | None) -> tuple[Array, Array, Array]:
    """Log-probability of the next id, the likeliest next id and its log-probability, each [T]."""
    model: Transformer = nnx.merge(graph, weights)
    hidden = model.hidden(ids[None], images=images)[0]  # [T, D]
    following = jnp.roll(ids, -1)  # the last one's means nothing

    def one_block(block: tuple[Float[Array, "block D"], Int[Array, "block"]]) -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(model.logits(block[0]), axis=-1)  # [block, V]
        best = jnp.argmax(logprobs, axis=-1)
        picked = jnp.take_along_axis(logprobs, jnp.stack([block[1], best], axis=1), axis=1)
        return picked[:, 0], best, picked[:, 1]

    size = min(LOGITS_BLOCK, len(ids))
    pad = -len(ids) % size
    blocks = jax.tree.map(
        lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]), (hidden, following)
    )
    return jax.tree.map(lambda x: x.reshape(-1)[: len(ids)], jax.lax.map(one_block, blocks))
