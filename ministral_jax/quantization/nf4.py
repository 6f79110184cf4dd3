"""NF4, a format of this project: the sixteen quantiles of QLoRA, a constant per 64 columns, which may be int8 itself.

The values are those of "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314, appendix E). Blocks run along
a row. With double quantisation the constants of a row are `offset + scale * int8`, with one offset and one scale per
row, where the paper has eight-bit floats in blocks of 256 that cross rows: so a row can be moved or sharded alone. The
scale is a bfloat16, whose product with an int8 is exact, so that a fused multiply-add cannot change the constant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

from .rounding import even_and_odd, unpacked
from .weight import contract_halves, in_row_blocks, is_one_token, vector_product

BLOCK = 64
STEP = 8
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight:
    """A matrix of quantiles, two columns a byte; int8 `absmax` comes with `absmax_scale` and `absmax_offset`."""

    payload: UInt8[Array, "O half"]
    absmax: Float[Array, "O blocks"] | Int8[Array, "O blocks"]
    absmax_scale: Float[Array, "O"] | None = None
    absmax_offset: Float[Array, "O"] | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        nibbles = unpacked(self.payload)  # [O, I]
        constants = jnp.repeat(self.constants(), BLOCK, axis=1)[:, : nibbles.shape[1]]
        return (nf4_values(nibbles) * constants).astype(dtype)

    def constants(self) -> Float[Array, "O blocks"]:
        """What each block's values are multiplied by."""
        if self.absmax_scale is None or self.absmax_offset is None:
            return self.absmax.astype(jnp.float32)
        return self.absmax_offset[:, None] + self.absmax_scale[:, None].astype(jnp.float32) * self.absmax.astype(
            jnp.float32
        )

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T`, W rounded to the dtype of `x` unless that is one token; activations are never quantised here."""
        arrays = (self.payload, self.constants())
        if is_one_token(x):
            return _of_rows(x, *arrays).astype(x.dtype)
        return in_row_blocks(functools.partial(_of_rows, x), arrays, x.shape[-1]).astype(x.dtype)


def _of_rows(
    x: Float[Array, "*T I"], payload: UInt8[Array, "O half"], constants: Float[Array, "O blocks"]
) -> Float[Array, "*T O"]:
    half = payload.shape[1]
    # In two steps, of which XLA fuses the last into the product; on a TPU it writes what a single longer one gives.
    eighths = jnp.repeat(constants, BLOCK // 2 // STEP, axis=1)
    spread = jnp.repeat(eighths, STEP, axis=1)[:, :half]  # [O, I/2]
    pairs = [(columns, nf4_values(nibbles)) for columns, nibbles in even_and_odd(x, payload)]  # of [O, I/2]
    if is_one_token(x):
        sums = sum(vector_product(columns.reshape(-1), values, spread) for columns, values in pairs)
        return jnp.reshape(sums, (*x.shape[:-1], -1))
    columns, values = zip(*pairs, strict=True)
    return contract_halves(columns, [(half * spread).astype(x.dtype) for half in values])


def nf4_values(nibbles: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
    """The table looked up by a tree of selections, which compilers fuse where they would not fuse a gather."""
    values = [jnp.full(nibbles.shape, value, jnp.float32) for value in NF4_VALUES]
    for bit in range(4):
        chosen = (nibbles >> bit) & 1 == 1
        values = [jnp.where(chosen, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]
