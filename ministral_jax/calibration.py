"""Calibration: the largest activation that each projection of a model gets on given tokens. Quantises nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .errors import RequestError
from .linear import Linear, projections
from .moe import ExpertLinear, MoE, group, route
from .transformer import Transformer

SHORTEST = 64  # tokens that a sequence is padded to; further lengths are powers of two


class _WatchedExperts(nnx.Module):
    """A mixture of experts that keeps the largest absolute number that each expert's projections were given."""

    def __init__(self, moe: MoE, count: nnx.Variable) -> None:
        self.inner = moe
        self.count = count
        # Those of w1 and w3 are the same.
        self.seen = nnx.Dict({name: nnx.Variable(jnp.zeros(moe.moe.n_experts)) for name in ("w1", "w2")})

    def __call__(self, x: Float[Array, "1 T D"]) -> Float[Array, "1 T D"]:
        rows, moe, experts = x[0], self.inner.moe, self.inner.experts
        within = jnp.arange(len(rows)) < self.count[...]
        chosen = jnp.where(within[:, None], route(self.inner.gate(rows), moe).experts, moe.n_experts)
        groups = group(chosen, moe.n_experts + 1)  # the last is of padding
        expert, sizes = jnp.sort(chosen.reshape(-1)), groups.sizes[:-1]
        given = rows[groups.tokens]  # [M, D], sorted by expert
        hidden = jax.nn.silu(experts.w1(given, sizes)) * experts.w3(given, sizes)  # [M, F]
        for name, numbers in (("w1", given), ("w2", hidden)):
            largest = jnp.max(jnp.abs(numbers), axis=1).astype(jnp.float32)
            self.seen[name][...] = self.seen[name][...].at[expert].max(largest, mode="drop")
        return self.inner(x)

    def maxima(self, name: str) -> Iterator[tuple[str, float]]:
        """Projection of each expert -> its largest input; where no token came, the largest of all experts."""
        for part, of in (("w1", "w1"), ("w2", "w2"), ("w3", "w1")):
            seen = np.asarray(self.seen[of][...])
            for expert, largest in enumerate(np.where(seen > 0, seen, seen.max())):
                yield f"{name}.experts.{expert}.{part}", float(largest)


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
    """Projection, of one expert where it is of experts -> largest absolute input over all `sequences` of token ids.

    The model itself is left as it is. Raises RequestError for ids outside the vocabulary, or no ids at all.
    """
    names = [name for name, linear in projections(model).items() if not isinstance(linear, ExpertLinear)]
    mixtures = [".".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, MoE)]
    count = nnx.Variable(jnp.int32(0))
    watched = _watch(model, names, mixtures, count)
    n_tokens = 0
    for ids in sequences:
        n_tokens += len(ids)
        if len(ids):
            count[...] = jnp.int32(len(ids))
            _run(watched, jnp.asarray(_padded(ids, model.config.vocab_size))[None])
    if not n_tokens:
        raise RequestError("no tokens to calibrate with: expected at least one")
    found = {name: float(_at(watched, name, inner=True).seen[...]) for name in names}
    return found | {key: value for name in mixtures for key, value in _at(watched, name).maxima(name)}


@nnx.jit
def _run(model: Transformer, tokens: Int[Array, "1 T"]) -> None:
    model.hidden(tokens)


def _watch(model: Transformer, names: Sequence[str], mixtures: Sequence[str], count: nnx.Variable) -> Transformer:
    """A copy of the module tree, over the same arrays, in which projections and mixtures of experts are watched."""
    copy = nnx.merge(*nnx.split(model))
    for kind, chosen in ((_Watched, names), (_WatchedExperts, mixtures)):  # what is inside first
        for name in chosen:
            parent, _, last = name.rpartition(".")
            setattr(_at(copy, parent), last, kind(_at(copy, name), count))
    return copy


def _at(model: nnx.Module, name: str, *, inner: bool = False) -> Any:
    """The module `name`; what is `inner` to a mixture that is watched is found there."""
    found: Any = model
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
        found = found.inner if inner and isinstance(found, _WatchedExperts) else found
    return found


def _padded(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise RequestError(f"token id {outside} to calibrate with: expected 0 to {vocab_size - 1}")
    length = max(SHORTEST, 1 << (len(ids) - 1).bit_length())
    return np.pad(np.asarray(ids, np.int32), (0, length - len(ids)), mode="edge")
