"""Rotary position embedding: frequencies (plain and YaRN) and rotation. The order of rows in files is row_order's.

In memory the pairs that turn together are (i, i + H/2), as in transformers' checkpoints.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import RopeConfig, YarnConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, "half"]:
    """Radians per token of each pair, float64: `theta ** (-2i / H)`, then YaRN where the model has it."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return plain if rope.yarn is None else _extend(plain, rope.yarn, rope.theta, head_dim)


def _extend(plain: np.ndarray, yarn: YarnConfig, theta: float, head_dim: int) -> np.ndarray:
    """YaRN's interpolation by parts (arXiv 2309.00071, section 3.2), with the borders rounded as transformers does."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(yarn.original_length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_that_turns(yarn.beta_slow)), head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain / yarn.factor * ramp + plain * (1.0 - ramp)


def rotation(
    positions: Int[Array, "*T"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "*T half"], Float[Array, "*T half"]]:
    """Cosine and sine of every pair's angle at absolute `positions`, float32, times YaRN's attention factor."""
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    factor = rope.yarn.attention_factor if rope.yarn else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float[Array, "*T N H"], cos: Float[Array, "*T half"], sin: Float[Array, "*T half"]
) -> Float[Array, "*T N H"]:
    """Turns the pairs (i, i + H/2) of every head, in float32, and rounds back to the dtype of `x`.

    RoFormer, arXiv 2104.09864, equation 34.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
