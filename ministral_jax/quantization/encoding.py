"""From a dense matrix to the parts of a quantised one, by absolute maxima: no statistics of data, no search.

Scales and rounding are those of compressed-tensors' own observers (`quantization/utils/helpers.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from . import fp8, nf4, nvfp4
from .formats import LinearFormat
from .rounding import FLOAT32_EPS, FP4_MAX, FP8, FP8_EPS, FP8_MAX, INT8_HALF_RANGE, divided, to_e2m1, to_fp8, to_int8

Parts = dict[str, Array]

# The formats in which a whole matrix has a scale.
ONE_SCALE = ("fp8_tensor", "nvfp4")


def encode(
    weight: Float[Array, "O I"],
    stored: LinearFormat,
    input_maximum: float | None = None,
    *,
    largest: float | None = None,
) -> Parts:
    """The parts of `weight` in the format `stored`, shaped as in memory.

    `input_maximum` is the largest absolute activation that the projection was seen to get, from which the scale of
    activations follows; needed where the format has one. `largest`, for the formats of ONE_SCALE alone, is the absolute
    maximum of all matrices that are to have the same scale (default: of this one).
    """
    assert largest is None or stored.format in ONE_SCALE, "this format has no scale that two matrices could share"
    shared = () if stored.format not in ONE_SCALE else (jnp.float32(0.0 if largest is None else largest),)
    parts = dict(_encoder(stored)(weight.astype(jnp.float32), *shared))
    if "input_scale" in stored.parts(*weight.shape):
        parts["input_scale"] = jnp.float32(_above_zero(input_maximum) / FP8_MAX)
    if "input_global_scale" in stored.parts(*weight.shape):
        parts["input_global_scale"] = jnp.float32(FP8_MAX * FP4_MAX / _above_zero(input_maximum))
    return parts


def relative_error(weight: Float[Array, "O I"], parts: Parts, stored: LinearFormat) -> float:
    """Root of the mean squared error of the quantised weight, over that of the weight itself."""
    return float(_relative_error(weight, parts, stored))


@functools.partial(jax.jit, static_argnames="stored")
def _relative_error(weight: Float[Array, "O I"], parts: Parts, stored: LinearFormat) -> Float[Array, ""]:
    dense = weight.astype(jnp.float32)
    difference = stored.weight(parts).dequantize() - dense
    return jnp.linalg.norm(difference) / jnp.maximum(jnp.linalg.norm(dense), FLOAT32_EPS)


def _above_zero(maximum: float | None) -> float:
    assert maximum is not None, "this format has a scale of activations, which needs calibration"
    return maximum if maximum > 0 and math.isfinite(maximum) else 1.0


@functools.cache
def _encoder(stored: LinearFormat) -> Callable[..., Parts]:
    encoders = {
        "int8_channel": _int8,
        "fp8_tensor": _fp8_tensor,
        "fp8_channel": _fp8_channel,
        "fp8_block": _fp8_block,
        "nvfp4": _nvfp4,
        "nf4": functools.partial(_nf4, double=stored.double),
    }
    return jax.jit(encoders[stored.format])


def _scale(maximum: Float[Array, "..."], half_range: float) -> Float[Array, "..."]:
    scale = divided(maximum, half_range)
    return jnp.where(scale == 0, FLOAT32_EPS, scale)


def _int8(weight: Float[Array, "O I"]) -> Parts:
    scale = _scale(jnp.max(jnp.abs(weight), axis=1), INT8_HALF_RANGE)  # [O]
    return {"weight": to_int8(weight, scale[:, None]), "weight_scale": scale}


def _fp8_tensor(weight: Float[Array, "O I"], shared: Float[Array, ""]) -> Parts:
    scale = _scale(jnp.maximum(jnp.max(jnp.abs(weight)), shared), FP8_MAX)
    return {"weight": to_fp8(weight, scale), "weight_scale": scale}


def _fp8_channel(weight: Float[Array, "O I"]) -> Parts:
    scale = _scale(jnp.max(jnp.abs(weight), axis=1), FP8_MAX)  # [O]
    return {"weight": to_fp8(weight, scale[:, None]), "weight_scale": scale}


def _fp8_block(weight: Float[Array, "O I"]) -> Parts:
    n_out, n_in = weight.shape
    rows, columns = fp8.blocks(n_out), fp8.blocks(n_in)
    padded = jnp.pad(weight, ((0, rows * fp8.BLOCK - n_out), (0, columns * fp8.BLOCK - n_in)))
    grid = padded.reshape(rows, fp8.BLOCK, columns, fp8.BLOCK)
    scale = _scale(jnp.max(jnp.abs(grid), axis=(1, 3)), FP8_MAX)  # [row blocks, column blocks]
    payload = to_fp8(grid, scale[:, None, :, None]).reshape(padded.shape)
    return {"weight": payload[:n_out, :n_in], "weight_scale": scale}


def _nvfp4(weight: Float[Array, "O I"], shared: Float[Array, ""]) -> Parts:
    largest = jnp.maximum(jnp.max(jnp.abs(weight)), shared)
    global_scale = jnp.where(largest > 0, FP8_MAX * FP4_MAX / largest, 1.0)
    groups = weight.reshape(len(weight), -1, nvfp4.GROUP)  # [O, G, 16]
    scale = global_scale * divided(jnp.max(jnp.abs(groups), axis=2), FP4_MAX)  # [O, G]
    scale = jnp.clip(scale, -FP8_MAX, FP8_MAX).astype(FP8)
    scale = jnp.where(scale == 0, jnp.asarray(FP8_EPS, FP8), scale)
    rounded = to_e2m1(divided(groups, divided(scale, global_scale)[:, :, None]))
    codes = _e2m1_codes(rounded).reshape(weight.shape)
    return {"weight_packed": _packed(codes), "weight_scale": scale, "weight_global_scale": global_scale}


def _e2m1_codes(values: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
    """The inverse of `e2m1_values`, for numbers that it gives."""
    doubled = (2 * jnp.abs(values)).astype(jnp.uint8)
    code = jnp.where(doubled < 4, doubled, jnp.where(doubled < 8, doubled // 2 + 2, doubled // 4 + 4))
    return code | (jnp.signbit(values).astype(jnp.uint8) << 3)


def _nf4(weight: Float[Array, "O I"], *, double: bool) -> Parts:
    n_out, n_in = weight.shape
    n_blocks = math.ceil(n_in / nf4.BLOCK)
    blocks = jnp.pad(weight, ((0, 0), (0, n_blocks * nf4.BLOCK - n_in))).reshape(n_out, n_blocks, nf4.BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=2)  # [O, blocks]
    parts: Parts = {"weight_absmax": absmax}
    if double:
        offset = jnp.mean(absmax, axis=1)  # [O]
        scale = divided(jnp.max(jnp.abs(absmax - offset[:, None]), axis=1), 127.0).astype(jnp.bfloat16)
        scale = jnp.where(scale == 0, jnp.bfloat16(1), scale)
        small = jnp.round(divided(absmax - offset[:, None], scale[:, None].astype(jnp.float32)))
        small = jnp.clip(small, -127, 127).astype(jnp.int8)
        parts = {"weight_absmax": small, "weight_absmax_scale": scale, "weight_absmax_offset": offset}
        absmax = offset[:, None] + scale[:, None].astype(jnp.float32) * small.astype(jnp.float32)
    relative = blocks / jnp.where(absmax == 0, 1.0, absmax)[:, :, None]
    middles = (np.array(nf4.NF4_VALUES[1:]) + np.array(nf4.NF4_VALUES[:-1])) / 2
    codes = sum((relative > middle).astype(jnp.uint8) for middle in middles.tolist())
    codes = jnp.asarray(codes).reshape(n_out, -1)[:, :n_in]
    return {"weight_packed": _packed(codes), **parts}


def _packed(codes: UInt8[Array, "O I"]) -> UInt8[Array, "O half"]:
    """Two columns a byte, the even one in the low nibble."""
    pairs = codes.reshape(len(codes), -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)
