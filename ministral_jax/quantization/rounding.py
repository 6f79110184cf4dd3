"""Rounding to eight and four bits, exactly as the reference runtimes round: scales, casts, nibbles. Knows no format.

The reference is compressed-tensors (`quantization/utils/helpers.py`, `quantization/lifecycle/forward.py`). All of it is
float32 arithmetic, rounded half to even.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
FP4_MAX = 6.0
# The reference divides the absolute maximum by half of the 255 steps, not by 127.
INT8_HALF_RANGE = 127.5

# What stands for a scale of zero, so that nothing divides by it: the epsilons of float32 and of e4m3.
FLOAT32_EPS = float(np.finfo(np.float32).eps)
FP8_EPS = 0.125


def divided(x: Float[Array, "..."], divisor: float | Float[Array, "..."]) -> Float[Array, "..."]:
    """`x / divisor` in float32, correctly rounded, for a divisor that is the same for many numbers.

    XLA turns such a division into a product with the reciprocal, which is off by one unit in the last place for most
    numbers, and rounds others to another code than the reference; a divisor that depends on `x` is left alone.
    """
    x = x.astype(jnp.float32)
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(divisor, jnp.float32))


def absolute_maximum(x: Float[Array, "*T I"]) -> Float[Array, "*T 1"]:
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)


def dynamic_scale(x: Float[Array, "*T I"], half_range: float) -> Float[Array, "*T 1"]:
    """The scale that takes the largest number of each last axis to the end of a symmetric range."""
    scale = divided(absolute_maximum(x), half_range)
    return jnp.where(scale == 0, FLOAT32_EPS, scale)


def to_int8(x: Float[Array, "*T I"], scale: Float[Array, "..."]) -> Int8[Array, "*T I"]:
    return jnp.round(jnp.clip(divided(x, scale), -128, 127)).astype(jnp.int8)


def to_fp8(x: Float[Array, "*T I"], scale: Float[Array, "..."]) -> Float[Array, "*T I"]:
    return jnp.clip(divided(x, scale), -FP8_MAX, FP8_MAX).astype(FP8)


def to_e2m1(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`x` rounded to 0, .5, 1, 1.5, 2, 3, 4 or 6 with its sign, as float32; ties go to the even significand."""
    x = jnp.clip(x, -FP4_MAX, FP4_MAX)
    size = jnp.abs(x)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    return jnp.round(x / step) * step


def e2m1_values(nibbles: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
    """Values of four-bit floats: bit 3 is the sign, bits 2 and 1 the exponent, bit 0 the significand."""
    code = (nibbles & 7).astype(jnp.int32)
    doubled = jnp.where(code < 4, code, jnp.where(code < 6, 2 * (code - 2), 4 * (code - 4)))
    value = doubled.astype(jnp.float32) * 0.5
    return jnp.where(nibbles & 8, -value, value)


def unpacked(payload: UInt8[Array, "O half"]) -> UInt8[Array, "O I"]:
    """Nibbles in the order of their columns: the low one of a byte is column 2k, the high one column 2k + 1."""
    pairs = jnp.stack([payload & 15, payload >> 4], axis=-1)  # [O, I/2, 2]
    return pairs.reshape(payload.shape[0], -1)


def even_and_odd(x: Float[Array, "*T I"], payload: UInt8[Array, "O half"]) -> list[tuple[Array, Array]]:
    """Even columns of activations with the nibbles they meet, then odd ones: so that no nibbles are interleaved."""
    return [(x[..., 0::2], payload & 15), (x[..., 1::2], payload >> 4)]
