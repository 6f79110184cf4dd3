"""What a request to a Generator may ask for, checked before any work is done. Knows neither arrays nor devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from ministral_jax.config import CACHE_DTYPES
from ministral_jax.errors import RequestError

from .sampling import SamplingParams


def answer_limit(
    name: str, prompt: Sequence[int], params: SamplingParams, *, vocab_size: int, max_length: int, has_tokenizer: bool
) -> int:
    """Tokens that the answer to `prompt` may have in a context of `max_length`. RequestErrors call it `name`."""
    if not len(prompt):
        raise RequestError(f"{name} is empty: expected at least one token")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(f"{name} has token id {outside}: expected 0 to {vocab_size - 1}, the model's vocabulary")
    room = max_length - len(prompt)
    if room < 1:
        raise RequestError(
            f"{name} has {len(prompt)} tokens: expected at most {max_length - 1}, "
            f"since the context holds {max_length} with the answer"
        )
    if params.stop and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer: give the model's, or use stop_ids")
    return room if params.max_tokens is None else min(room, params.max_tokens)


def known_cache_dtype(name: str) -> jnp.dtype:
    """The dtype that keys and values are to be kept in. Raises RequestError for one that is not allowed."""
    if name not in CACHE_DTYPES:
        raise RequestError(f"cache dtype {name!r}: expected one of {', '.join(CACHE_DTYPES)}")
    return jnp.dtype(name)
