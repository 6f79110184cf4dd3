"""FP8 (e4m3) weights with one scale, one per row, or one per 128 x 128 block; activations in FP8 too.

`W = payload * scale`: every spelling of the scale multiplies, `weight_scale_inv` included. Activations are divided by
their scale, clamped to +-448 and rounded to e4m3. A scale for them is given by the file (static), or is found per token
(dynamic), with blocks per token and 128 columns.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.dispatch import target

from .rounding import FP8_MAX, dynamic_scale, to_fp8
from .weight import contract, vector_product

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
        """`x @ W.T` with activations as they are; the scales multiply float32 sums over 128 columns."""
        return self._product(x, rounded=False)

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`q(x) @ W.T`: 128 columns at a time, each token's group in e4m3 with its own scale, sums in float32."""
        return self._product(x, rounded=True)

    def _product(self, x: Float[Array, "*T I"], *, rounded: bool) -> Float[Array, "*T O"]:
        rows = x.reshape(-1, x.shape[-1])
        whole = all(size % BLOCK == 0 for size in self.payload.shape) and x.dtype in (jnp.bfloat16, jnp.float32)
        if whole and target().platform == "tpu":
            sums: Array = _by_kernel(rows, self.payload, self.scale, rounded)  # pyright: ignore[reportAssignmentType]
        else:
            sums = self.by_groups(rows, rounded)
        return sums.astype(x.dtype).reshape(*x.shape[:-1], -1)

    def by_groups(self, x: Float[Array, "tokens I"], rounded: bool) -> Float[Array, "tokens O"]:
        """The product in float32 as XLA computes it."""
        columns, weights = self._groups(x)
        if not rounded:
            return self._sums(columns, weights, None)
        x_scale = dynamic_scale(columns, FP8_MAX)  # [G, T, 1]
        return self._sums(to_fp8(columns, x_scale), weights, x_scale)

    def _groups(self, x: Float[Array, "tokens I"]) -> tuple[Float[Array, "G tokens 128"], Float[Array, "O G 128"]]:
        """Activations and payload in groups of 128 columns, the last one filled up with zeros."""
        n_out, n_in = self.payload.shape
        groups = self.scale.shape[1]
        filling = ((0, 0), (0, groups * BLOCK - n_in))
        columns = jnp.pad(x, filling).reshape(-1, groups, BLOCK).swapaxes(0, 1)
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
            scale = row_scale if x_scale is None else row_scale * x_scale[:, 0, 0]
            spread = jnp.repeat(scale, BLOCK, axis=1)  # [O, I]
            return vector_product(columns.reshape(-1), weights.reshape(n_out, -1), spread)[None]

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_kernel(
    x: Float[Array, "tokens I"],
    payload: Float[Array, "O I"],
    scale: Float[Array, "row_blocks column_blocks"],
    rounded: bool,
) -> Float[Array, "tokens O"]:
    """`Fp8BlockWeight.by_groups` on a TPU, where XLA would copy the matrix first. Differentiable in `x`, by that."""
    from pallas_kernels.tpu.block_product import block_product

    if not rounded:
        return block_product(x, None, payload, scale)
    groups = x.reshape(len(x), -1, BLOCK)
    x_scale = dynamic_scale(groups, FP8_MAX)  # [T, G, 1]
    numbers = to_fp8(groups, x_scale).reshape(x.shape).astype(x.dtype)
    return block_product(numbers, x_scale[:, :, 0], payload, scale)


def _forward(x: Array, payload: Array, scale: Array, rounded: bool) -> tuple[Array, tuple[Array, ...]]:
    return _by_kernel(x, payload, scale, rounded), (x, payload, scale)


def _backward(rounded: bool, kept: tuple[Array, ...], d_sums: Array) -> tuple[Array, None, None]:
    x, payload, scale = kept
    weight = Fp8BlockWeight(payload, scale)
    return jax.vjp(lambda x: weight.by_groups(x, rounded), x)[1](d_sums)[0], None, None


_by_kernel.defvjp(_forward, _backward)


def blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return math.ceil(size / BLOCK)
