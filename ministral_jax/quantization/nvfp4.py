"""NVFP4: four-bit floats in groups of 16 columns with an e4m3 scale each, and one divisor for the matrix.

`nvfp4-pack-quantized` of compressed-tensors. `W = e2m1 * (scale / global_scale)`. A group's scale times a four-bit
value has six significant bits, exact in bfloat16 and float16; the products here use that, and divide the sums.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from .rounding import (
    FP4_MAX,
    FP8,
    FP8_EPS,
    FP8_MAX,
    absolute_maximum,
    divided,
    e2m1_values,
    even_and_odd,
    to_e2m1,
    unpacked,
)
from .weight import contract_halves, in_row_blocks, is_one_token, vector_product

GROUP = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nvfp4Weight:
    """A matrix in e2m1, two columns a byte; `input_global_scale` belongs to activations and may be absent."""

    payload: UInt8[Array, "O half"]
    scale: Float[Array, "O groups"]
    global_scale: Float[Array, ""]
    input_global_scale: Float[Array, ""] | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        scale = divided(self.scale, self.global_scale)  # [O, G]
        return (e2m1_values(unpacked(self.payload)) * jnp.repeat(scale, GROUP, axis=1)).astype(dtype)

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` with activations as they are; the divisor divides the float32 sums."""
        return (self._local_product(x) / self.global_scale).astype(x.dtype)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T`, activations in NVFP4 with group scales of their own."""
        assert self.input_global_scale is not None, "activations of this matrix have no global scale"
        local = nvfp4_rounded(x, self.input_global_scale).astype(x.dtype)
        return (self._local_product(local) / self.input_global_scale / self.global_scale).astype(x.dtype)

    def _local_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` for the matrix before its divisor, in float32."""
        if is_one_token(x):
            return _of_rows(x, self.payload, self.scale)
        return in_row_blocks(functools.partial(_of_rows, x), (self.payload, self.scale), x.shape[-1])


def _of_rows(
    x: Float[Array, "*T I"], payload: UInt8[Array, "O half"], scale: Float[Array, "O groups"]
) -> Float[Array, "*T O"]:
    spread = jnp.repeat(scale.astype(jnp.float32), GROUP // 2, axis=1)  # [O, I/2]
    pairs = [(columns, e2m1_values(nibbles)) for columns, nibbles in even_and_odd(x, payload)]  # of [O, I/2]
    if is_one_token(x):
        sums = sum(vector_product(columns.reshape(-1), values, spread) for columns, values in pairs)
        return jnp.reshape(sums, (*x.shape[:-1], -1))
    columns, values = zip(*pairs, strict=True)
    return contract_halves(columns, [(half * spread).astype(x.dtype) for half in values])  # exact in 16 bits


def nvfp4_rounded(x: Float[Array, "*T I"], global_scale: Float[Array, ""]) -> Float[Array, "*T I"]:
    """`x * global_scale` rounded to NVFP4, groups of 16 along the last axis, as float32."""
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, GROUP)  # [*T, G, 16]
    scale = global_scale * divided(absolute_maximum(groups), FP4_MAX)
    scale = jnp.clip(scale, -FP8_MAX, FP8_MAX).astype(FP8).astype(jnp.float32)
    scale = jnp.where(scale == 0, FP8_EPS, scale)
    rounded = to_e2m1(divided(groups, divided(scale, global_scale))) * scale
    return rounded.reshape(x.shape)
