"""The dense SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .linear import Linear


class FeedForward(nnx.Module):
    """`w2(silu(w1(x)) * w3(x))`: w1 is the gate, w3 the up and w2 the down projection."""

    def __init__(self, dim: int, hidden_dim: int, dtype: DTypeLike) -> None:
        self.w1 = Linear(hidden_dim, dim, ("hidden", "embed"), dtype)
        self.w2 = Linear(dim, hidden_dim, ("embed", "hidden"), dtype)
        self.w3 = Linear(hidden_dim, dim, ("hidden", "embed"), dtype)

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))
