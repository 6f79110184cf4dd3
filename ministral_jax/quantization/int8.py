"""W8A8: int8 weights with a float32 scale per output row, and activations rounded to int8 per token as they come.

`int-quantized` of compressed-tensors. `W = payload * scale`, symmetric, no zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from .rounding import INT8_HALF_RANGE, dynamic_scale, to_int8
from .weight import contract


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A matrix in int8, one scale per row."""

    payload: Int8[Array, "O I"]
    scale: Float[Array, "O"]

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        return (self.payload.astype(jnp.float32) * self.scale[:, None]).astype(dtype)

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` with activations as they are; the scales multiply the float32 sums."""
        sums = contract(x, self.payload.astype(x.dtype))  # [*T, O]
        return (sums * self.scale).astype(x.dtype)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T` with each token rounded to int8 by its own largest number; the sums are exact int32."""
        x_scale = dynamic_scale(x, INT8_HALF_RANGE)  # [*T, 1]
        sums = lax.dot_general(
            to_int8(x, x_scale),
            self.payload,
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )  # [*T, O]
        return (sums.astype(jnp.float32) * x_scale * self.scale).astype(x.dtype)
