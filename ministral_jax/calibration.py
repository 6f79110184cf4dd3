"""Calibration: the largest activation that each projection of a model gets on given tokens. Quantises nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .errors import RequestError
from .linear import Linear, projections
from .transformer import Transformer

SHORTEST = 64  # tokens that a sequence is padded to; further lengths are powers of two


class _Watched(nnx.Module):
    """A projection that keeps the largest absolute number it was given for the first `count` tokens of a sequence."""

    def __init__(self, linear: Linear, count: nnx.Variable) -> None:
        self.linear = linear
        self.count = count
        self.seen = nnx.Variable(jnp.float32(0.0))

    def __call__(self, x: Float[Array, "1 T I"]) -> Float[Array, "1 T O"]:
        within = jnp.arange(x.shape[1]) < self.count[...]
        largest = jnp.max(jnp.where(within[:, None], jnp.abs(x), 0))
        self.seen[...] = jnp.maximum(self.seen[...], largest.astype(jnp.float32))
        return self.linear(x)


def input_maxima(model: Transformer, sequences: Iterable[Sequence[int]]) -> dict[str, float]:
    """Projection -> largest absolute input over all `sequences` of token ids.

    The model itself is left as it is. Raises RequestError for ids outside the vocabulary, or no ids at all.
    """
    names = list(projections(model))
    count = nnx.Variable(jnp.int32(0))
    watched = _watch(model, names, count)
    n_tokens = 0
    for ids in sequences:
        n_tokens += len(ids)
        if len(ids):
            count[...] = jnp.int32(len(ids))
            _run(watched, jnp.asarray(_padded(ids, model.config.vocab_size))[None])
    if not n_tokens:
        raise RequestError("no tokens to calibrate with: expected at least one")
    return {name: float(_at(watched, name).seen[...]) for name in names}


@nnx.jit
def _run(model: Transformer, tokens: Int[Array, "1 T"]) -> None:
    model.hidden(tokens)


def _watch(model: Transformer, names: Sequence[str], count: nnx.Variable) -> Transformer:
    """A copy of the module tree, over the same arrays, in which each projection is watched."""
    copy = nnx.merge(*nnx.split(model))
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(_at(copy, parent), last, _Watched(_at(copy, name), count))
    return copy


def _at(model: nnx.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def _padded(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise RequestError(f"token id {outside} to calibrate with: expected 0 to {vocab_size - 1}")
    length = max(SHORTEST, 1 << (len(ids) - 1).bit_length())
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), mode="edge")
