"""FP8 (e4m3) weights with one scale, one per row, or one per 128 x 128 block; activations in FP8 too.

`W = payload * scale`: every spelling of the scale multiplies, `weight_scale_inv` included. Activations are divided by
their scale, clamped to +-448 and rounded to e4m3. A scale for them is given by the file (static), or is found per token
(dynamic), with blocks per token and 128 columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .rounding import FP8_MAX, dynamic_scale, to_fp8
from .weight import contract

BLOCK = 128
# Partial sums of all groups of columns are held at once up to this size; beyond it the groups are gone through in turn.
MAX_PARTIAL_BYTES = 64 * 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8Weight:
    """A matrix in e4m3 with one `scale`, or one per row; `input_scale` is the static one of activations."""

    payload: Float[Array, "O I"]
    scale: Float[Array, ""] | Float[Array, "O"]
    input_scale: Float[Array, ""] | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        scale = self.scale[:, None] if self.scale.ndim else self.scale
        return (self.payload.astype(jnp.float32) * scale).astype(dtype)

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` with activations as they are; the scale multiplies the float32 sums."""
        sums = contract(x, self.payload.astype(x.dtype))  # [*T, O]
        return (sums * self.scale).astype(x.dtype)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T`, products of e4m3 numbers summed in float32."""
        x_scale = dynamic_scale(x, FP8_MAX) if self.input_scale is None else self.input_scale  # [*T, 1] or []
        sums = contract(to_fp8(x, x_scale), self.payload)  # [*T, O]
        return (sums * x_scale * self.scale).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fp8BlockWeight:
    """A matrix in e4m3 with a scale for each 128 x 128 block; the last block of a row or column may be smaller."""

    payload: Float[Array, "O I"]
    scale: Float[Array, "row_blocks column_blocks"]

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        return (self.payload.astype(jnp.float32) * self._spread_scale()).astype(dtype)

    def _spread_scale(self) -> Float[Array, "O I"]:
        n_out, n_in = self.payload.shape
        rows = jnp.repeat(self.scale, BLOCK, axis=0)[:n_out]  # [O, column blocks]
        return jnp.repeat(rows, BLOCK, axis=1)[:, :n_in]

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` with activations as they are and W rounded to their dtype."""
        return contract(x, self.dequantize(x.dtype)).astype(x.dtype)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T`: 128 columns at a time, each token's group in e4m3 with its own scale, sums in float32."""
        n_out, n_in = self.payload.shape
        groups = self.scale.shape[1]
        padding = groups * BLOCK - n_in
        tokens = x.reshape(-1, n_in)  # [T, I]
        columns = jnp.pad(tokens, ((0, 0), (0, padding))).reshape(-1, groups, BLOCK).swapaxes(0, 1)  # [G, T, 128]
        weights = jnp.pad(self.payload, ((0, 0), (0, padding))).reshape(n_out, groups, BLOCK)
        x_scale = dynamic_scale(columns, FP8_MAX)  # [G, T, 1]
        quantized = to_fp8(columns, x_scale)
        row_scale = jnp.repeat(self.scale, BLOCK, axis=0)[:n_out].T[:, None, :]  # [G, 1, O]

        def group(sums: Array, g: Array) -> tuple[Array, None]:
            part = contract(quantized[g], weights[:, g])  # [T, O]
            return sums + part * x_scale[g] * row_scale[g], None

        if 4 * groups * len(tokens) * n_out <= MAX_PARTIAL_BYTES:
            parts = lax.dot_general(
                quantized, weights, (((2,), (2,)), ((0,), (1,))), preferred_element_type=jnp.float32
            )  # [G, T, O]
            sums = jnp.sum(parts * x_scale * row_scale, axis=0)  # [T, O]
        else:
            start = jnp.zeros((len(tokens), n_out), jnp.float32)
            sums, _ = lax.scan(group, start, jnp.arange(groups))
        return sums.astype(x.dtype).reshape(*x.shape[:-1], n_out)


def blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return math.ceil(size / BLOCK)
