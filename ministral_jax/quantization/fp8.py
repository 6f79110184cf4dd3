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
from .weight import contract, vector_product

BLOCK = 128
# What one token is filled up to on a TPU: a tile of rows in bfloat16.
TPU_TOKENS = 16
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
        """`x @ W.T` with activations as they are; the scales multiply float32 sums over 128 columns."""
        columns, weights = self._groups(x)
        return self._sums(columns, weights, None).astype(x.dtype).reshape(*x.shape[:-1], -1)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T`: 128 columns at a time, each token's group in e4m3 with its own scale, sums in float32."""
        columns, weights = self._groups(x)
        x_scale = dynamic_scale(columns, FP8_MAX)  # [G, T, 1]
        sums = self._sums(to_fp8(columns, x_scale), weights, x_scale)  # [T, O]
        return sums.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def _groups(self, x: Float[Array, "*T I"]) -> tuple[Float[Array, "G tokens 128"], Float[Array, "O G 128"]]:
        """Activations and payload in groups of 128 columns, the last one filled up with zeros."""
        n_out, n_in = self.payload.shape
        groups = self.scale.shape[1]
        filling = ((0, 0), (0, groups * BLOCK - n_in))
        columns = jnp.pad(x.reshape(-1, n_in), filling).reshape(-1, groups, BLOCK).swapaxes(0, 1)
        return columns, jnp.pad(self.payload, filling).reshape(n_out, groups, BLOCK)

    def _sums(
        self,
        columns: Float[Array, "G tokens 128"],
        weights: Float[Array, "O G 128"],
        x_scale: Float[Array, "G tokens 1"] | None,
    ) -> Float[Array, "tokens O"]:
        """Sums over groups of their products times both scales, in float32."""
        (groups, tokens, _), n_out = columns.shape, len(weights)
        row_scale = jnp.repeat(self.scale, BLOCK, axis=0)[:n_out]  # [O, G]
        if tokens == 1:
            return self._of_one_token(columns, weights, row_scale, x_scale)

        def scaled(part: Array, g: Array | slice) -> Array:
            part = part * row_scale.T[g, None, :]
            return part if x_scale is None else part * x_scale[g]

        if 4 * groups * tokens * n_out <= MAX_PARTIAL_BYTES:
            axes = (((2,), (2,)), ((0,), (1,)))
            weights = weights.astype(columns.dtype)
            parts = lax.dot_general(columns, weights, axes, preferred_element_type=jnp.float32)  # [G, T, O]
            return jnp.sum(scaled(parts, slice(None)), axis=0)

        def group(sums: Array, g: Array) -> tuple[Array, None]:
            return sums + scaled(contract(columns[g], weights[:, g].astype(columns.dtype)), g), None

        return lax.scan(group, jnp.zeros((tokens, n_out), jnp.float32), jnp.arange(groups))[0]

    def _of_one_token(
        self,
        columns: Float[Array, "G 1 128"],
        weights: Float[Array, "O G 128"],
        row_scale: Float[Array, "O G"],
        x_scale: Float[Array, "G 1 1"] | None,
    ) -> Float[Array, "1 O"]:
        """As a sum of products; but on a TPU XLA writes the matrix for that, and not for products of 16 tokens."""

        def alone() -> Array:
            scale = row_scale if x_scale is None else row_scale * x_scale[:, 0, 0]
            spread = jnp.repeat(scale, BLOCK, axis=1)  # [O, I]
            return vector_product(columns.reshape(-1), weights.reshape(len(weights), -1), spread)[None]

        def among_zeros() -> Array:
            others = ((0, 0), (0, TPU_TOKENS - 1), (0, 0))
            scales = None if x_scale is None else jnp.pad(x_scale, others)
            return self._sums(jnp.pad(columns, others), weights, scales)[:1]

        return lax.platform_dependent(tpu=among_zeros, default=alone)


def blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return math.ceil(size / BLOCK)
