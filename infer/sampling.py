"""Choosing the next token: what a request may ask for, and the choice itself on the device, a batch at a time.

Every sequence draws from its own random stream, indexed by how many tokens it has produced, so that a result does not
depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from ministral_jax.errors import RequestError

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued.

    Penalties come first, then temperature, then top-k, top-p and min-p in that order, each on what the one before left.

    Attributes:
      max_tokens: most tokens to produce; None for as many as the context leaves.
      temperature: 0 takes the likeliest token.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens until their probability reaches this.
      min_p: keep tokens at least this times as likely as the likeliest.
      seed: of the random stream; None draws one.
      repetition_penalty: divides positive logits of tokens seen in prompt or answer and multiplies negative ones.
      presence_penalty: subtracted once from logits of tokens in the answer.
      frequency_penalty: subtracted from logits of tokens in the answer, once per occurrence.
      stop: strings that end the answer; they are left out of it.
      stop_ids: tokens that end the answer, besides the tokenizer's end of sequence; left out.
      ignore_eos: go on past the end-of-sequence token.
      logprobs: how many alternatives to report per token (0 for the chosen one's log-probability alone), or None.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or a positive number")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or a positive number")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**32, "between 0 and 2**32 - 1")
        positive = 0 < self.repetition_penalty < math.inf
        _check("repetition_penalty", self.repetition_penalty, positive, "a positive number")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), math.isfinite(getattr(self, name)), "a finite number")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")
        reported = self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS
        _check("logprobs", self.logprobs, reported, f"None or between 0 and {MAX_TOP_LOGPROBS}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def filters(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def _check(name: str, value: object, allowed: bool, expected: str) -> None:
    if not allowed:
        raise RequestError(f"{name}={value!r} is not allowed: expected {expected}")


class SamplingMode(NamedTuple):
    """What a batch asks for at all; static, so that a greedy batch compiles to an argmax."""

    stochastic: bool
    filtered: bool
    penalised: bool
    top_logprobs: int | None


class SamplingArrays(NamedTuple):
    """The numbers of each sequence's SamplingParams, as the device wants them."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    seed: Int[Array, "B"]


class History(NamedTuple):
    """What each sequence has said, for penalties: [B, V], or [B, 0] when nothing in the batch penalises."""

    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]


class Choice(NamedTuple):
    """Chosen tokens with log-probabilities under the model's own distribution, before penalties and temperature."""

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    top_ids: Int[Array, "B top"]
    top_logprobs: Float[Array, "B top"]


def batch_mode(params: Sequence[SamplingParams]) -> SamplingMode:
    """The least that serves every sequence of a batch."""
    asked = [p.logprobs for p in params if p.logprobs is not None]
    return SamplingMode(
        stochastic=any(p.temperature > 0 for p in params),
        filtered=any(p.filters for p in params),
        penalised=any(p.penalises for p in params),
        top_logprobs=max(asked) if asked else None,
    )


def batch_arrays(params: Sequence[SamplingParams]) -> SamplingArrays:
    """One row per sequence; a seed of None is drawn here."""

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray(np.array([getattr(p, name) for p in params], dtype))

    drawn = np.random.default_rng().integers(0, 2**32, len(params), dtype=np.uint32)
    if jax.process_count() > 1:  # every process has to draw the same
        drawn = multihost_utils.broadcast_one_to_all(drawn)
    seeds = [drawn[i] if p.seed is None else p.seed for i, p in enumerate(params)]
    return SamplingArrays(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition=column("repetition_penalty", np.float32),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        seed=jnp.asarray(np.array(seeds, np.uint32)),
    )


def start_history(prompts: Sequence[Sequence[int]], vocab_size: int, mode: SamplingMode) -> History:
    """The history before the first token; empty columns when the batch has no penalties."""
    width = vocab_size if mode.penalised else 0
    in_prompt = np.zeros((len(prompts), width), bool)
    if mode.penalised:
        for row, prompt in zip(in_prompt, prompts, strict=True):
            row[np.asarray(prompt, np.int64)] = True
    return History(jnp.asarray(in_prompt), jnp.zeros((len(prompts), width), jnp.int32))


def penalise(logits: Float[Array, "B V"], arrays: SamplingArrays, history: History) -> Float[Array, "B V"]:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858), presence and frequency penalties, in that order."""
    repetition = arrays.repetition[:, None]
    seen = history.in_prompt | (history.counts > 0)
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    counts = history.counts.astype(jnp.float32)
    return logits - arrays.frequency[:, None] * counts - arrays.presence[:, None] * (counts > 0)


def kept_tokens(scaled: Float[Array, "B V"], arrays: SamplingArrays) -> Bool[Array, "B V"]:
    """Which tokens top-k, top-p and min-p leave, from logits after temperature. The likeliest always stays."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None]
    keep = jnp.where(arrays.top_k[:, None] > 0, rank < arrays.top_k[:, None], True)
    probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    keep &= (before < arrays.top_p[:, None]) | (arrays.top_p[:, None] >= 1.0)
    keep &= probs >= arrays.min_p[:, None] * probs[:, :1]
    keep = keep.at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(keep), order, keep, axis=-1, inplace=False)


def choose(
    logits: Float[Array, "B V"],
    arrays: SamplingArrays,
    history: History,
    produced: Int[Array, "B"],
    mode: SamplingMode,
) -> Choice:
    """The next token of every sequence. `produced` counts the tokens it has, which indexes its random stream."""
    adjusted = penalise(logits, arrays, history) if mode.penalised else logits
    tokens = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    if mode.stochastic:
        scaled = adjusted / jnp.maximum(arrays.temperature, 1e-6)[:, None]
        if mode.filtered:
            scaled = jnp.where(kept_tokens(scaled, arrays), scaled, -jnp.inf)

        def noise(seed: Array, index: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), logits.shape[1:])

        drawn = jnp.argmax(scaled + jax.vmap(noise)(arrays.seed, produced), axis=-1).astype(jnp.int32)
        tokens = jnp.where(arrays.temperature > 0, drawn, tokens)
    if mode.top_logprobs is None:
        nothing = jnp.zeros((len(tokens), 0))
        return Choice(tokens, jnp.zeros(len(tokens)), nothing.astype(jnp.int32), nothing)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, mode.top_logprobs)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Choice(tokens, chosen, top_ids.astype(jnp.int32), top_logprobs)


def record(history: History, tokens: Int[Array, "B"], active: Bool[Array, "B"], mode: SamplingMode) -> History:
    """The history with one more token for every active sequence."""
    if not mode.penalised:
        return history
    rows = jnp.arange(len(tokens))
    return history._replace(counts=history.counts.at[rows, tokens].add(active.astype(jnp.int32)))
