"""What a model that is being trained answers to a few prompts, without a cache and without a second copy of it.

Every token is computed from the whole sequence again, by the layers that training scans over. For a few short answers
that is less work than a training step, where a model for decoding would hold all its weights once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ministral_jax.errors import ConfigError
from ministral_jax.tokenizer import Tokenizer

from .config import SamplesConfig
from .step import Arrays, TrainState, TrainStep

_LENGTHS = 64  # sequences are a multiple of so many tokens long


def encoded_prompts(config: SamplesConfig, tokenizer: Tokenizer, max_length: int) -> list[list[int]]:
    """The ids of a run's prompts. Raises ConfigError for one that leaves no room for an answer in `max_length`."""
    if config.chat:
        prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]).tokens for text in config.prompts]
    else:
        prompts = [tokenizer.encode(text, bos=True) for text in config.prompts]
    longest = max(map(len, prompts), default=0)
    if longest + config.max_tokens > max_length:
        raise ConfigError(
            f"samples: a prompt of {longest} tokens and max_tokens={config.max_tokens} are more than the model's "
            f"context of {max_length}"
        )
    return prompts


class Preview:
    """Answers a run's prompts, encoded as `prompts`, with the likeliest tokens; compiles once, on the first call."""

    def __init__(
        self, step: TrainStep, config: SamplesConfig, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer
    ) -> None:
        self.prompts = config.prompts
        self._step, self._tokenizer, self._max_tokens = step, tokenizer, config.max_tokens
        self._ids = prompts
        layout = step.layout
        self._tokens, self._lengths = _padded(
            self._ids,
            config.max_tokens,
            rows=1 if layout is None else layout.ways("batch"),
            length=math.lcm(_LENGTHS, 1 if layout is None else layout.ways("sequence")),
        )
        places: dict[str, Any] = {} if layout is None else {"out_shardings": layout.sharding()}
        self._continued = jax.jit(self._continue, **places)

    def __call__(self, state: TrainState) -> list[str]:
        """The answer to each prompt, on every process."""
        tokens = np.asarray(self._continued(state.trained, state.frozen, self._tokens, self._lengths))
        answers = []
        for row, length in zip(tokens, map(len, self._ids), strict=False):
            answer = row[length : length + self._max_tokens].tolist()
            end = answer.index(self._tokenizer.eos_id) if self._tokenizer.eos_id in answer else len(answer)
            answers.append(self._tokenizer.decode(answer[:end], keep_special=True))
        return answers

    def _continue(
        self, trained: Arrays, frozen: Arrays, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
    ) -> Int[Array, "B T"]:
        """`tokens` with each row's answer after its prompt; what stands behind a token does not reach it."""
        model = self._step.model(trained, frozen, None)
        rows = jnp.arange(len(lengths))
        fills_up = rows >= len(self._ids)
        eos = self._tokenizer.eos_id

        def goes_on(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
            _, said, ended = carry
            return (said < self._max_tokens) & ~ended.all()

        def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tokens, said, ended = carry
            hidden = model.hidden(tokens)[rows, lengths + said - 1]  # [B, D]
            following = jnp.argmax(model.logits(hidden), axis=-1).astype(tokens.dtype)  # [B]
            following = jnp.where(ended, eos, following)
            return tokens.at[rows, lengths + said].set(following), said + 1, ended | (following == eos)

        start = (tokens, jnp.zeros((), jnp.int32), fills_up)
        return jax.lax.while_loop(goes_on, add, start)[0]


def _padded(
    prompts: Sequence[Sequence[int]], max_tokens: int, *, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as rows [B, T] with room for answers, and their lengths [B]; B and T are multiples of `rows`, `length`.

    The rows that fill up are of one token.
    """
    n_rows = math.ceil(len(prompts) / rows) * rows
    n_tokens = math.ceil((max(map(len, prompts)) + max_tokens) / length) * length
    tokens, lengths = np.zeros((n_rows, n_tokens), np.int32), np.ones(n_rows, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths
