"""The one projection of the model. Weights stay `[out, in]`, as published."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .parameters import ParameterSpec


class Linear(nnx.Module):
    """`x @ weight.T` without bias; `axes` are the logical axes of (out, in)."""

    def __init__(self, n_out: int, n_in: int, axes: tuple[str, str], dtype: DTypeLike) -> None:
        self.weight = ParameterSpec((n_out, n_in), axes, dtype).placeholder()

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        return jnp.einsum("...I,OI->...O", x, self.weight[...])
