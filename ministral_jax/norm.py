"""RMSNorm, the one normalisation of the family."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .parameters import ParameterSpec


def rms_norm(x: Float[Array, "*T D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*T D"]:
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32 (Zhang and Sennrich 2019, arXiv 1910.07467).

    The normalised value is rounded to the dtype of `x` before the weight multiplies it, as mistral-inference and
    transformers do; in bfloat16 the order shows.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight."""

    def __init__(self, dim: int, eps: float, dtype: DTypeLike) -> None:
        self.eps = eps
        self.weight = ParameterSpec((dim,), ("norm",), dtype, init="ones").placeholder()

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return rms_norm(x, self.weight[...], self.eps)
