"""flash_attention by cuDNN, through jax: a baseline to compare with, not used unless asked for by name."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int


def flash_attention_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    window: int | None,
    query_segments: None,
    key_segments: None,
    query_offset: Int[Array, ""] | int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], None]:
    """As `flash_attention_reference` where T equals S and there are no segments; no log-sum-exp."""
    # cuDNN counts the keys to the left of a query, not the query itself.
    left = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
    )
    return out, None
