"""Context parallelism: causal attention of sequences that lie split over a mesh axis. Its interface, for shard_map.

Keys travel between neighbours: the halo of a window (halo.py), or all of them round the ring (ring.py). Nothing gathers
them. What decoding through a split cache needs is in context_pages.py.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention
from pallas_kernels.arguments import check_flash_arrays, check_heads_and_window
from pallas_kernels.flash_attention import Implementation

from .chunks import Chunks, Split
from .halo import halo_attention
from .ring import RingSettings, ring_attention

__all__ = ["Split", "context_flash_attention", "context_order", "context_positions"]


def context_flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    axis_name: str,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    split: Split = "contiguous",
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "B T N Hv"]:
    """`flash_attention` of whole sequences, on the part of them that this shard holds. Differentiable.

    Called inside `jax.shard_map(..., check_vma=False)`; collectives are over `axis_name` alone. Under a window each
    shard fetches the `window - 1` keys before its own and attends in one call per run of tokens. Without one, keys and
    values go round the ring (Liu et al. 2023, arXiv 2310.01889), partial results merge by their log-sum-exp, and in
    the backward pass gradients of keys and values travel with them; memory does not grow with the number of shards.

    Args:
      q, k, v: this shard's tokens, rotated already by their positions in the whole sequence (`context_positions`).
      axis_name: mesh axis over which the sequences are split, C shards.
      window, scale, implementation, interpret: as for `flash_attention`.
      segment_ids: of this shard's tokens; they travel with the keys.
      split: "contiguous": shard c holds tokens `c * T .. (c + 1) * T - 1`. "zigzag": runs c and `2C - 1 - c` of 2C
        equal ones, which gives every shard the same work where there is no window (see docs/sharding.md).

    Raises ValueError as `flash_attention` does, ShardingError where T does not suit the split.
    """
    check_flash_arrays(q, k, v)
    check_heads_and_window(q.shape[2], k.shape[2], window)
    chunks = Chunks.of(q.shape[1], axis_name, split)
    options: dict[str, Any] = {"scale": scale, "implementation": implementation, "interpret": interpret}
    if chunks.shards == 1:
        return flash_attention(q, k, v, window=window, segment_ids=segment_ids, **options)
    if window is None or window >= chunks.shards * q.shape[1]:
        return ring_attention(RingSettings(chunks, **options), q, k, v, segment_ids)
    return halo_attention(chunks, q, k, v, segment_ids, window, options)


def context_positions(n_tokens: int, axis_name: str, split: Split = "contiguous") -> Int[Array, "T"]:
    """Position in the whole sequence of each of this shard's `n_tokens`; inside shard_map."""
    chunks = Chunks.of(n_tokens, axis_name, split)
    run = jnp.arange(chunks.length, dtype=jnp.int32)
    return jnp.concatenate([chunks.number(slot) * chunks.length + run for slot in range(chunks.per_shard)])


def context_order(length: int, shards: int, split: Split = "contiguous") -> Int[np.ndarray, "T"]:
    """Position of each token of a sequence of `length` in the order in which C shards hold it, shard after shard.

    `tokens[:, order]` is what to split evenly; `jnp.argsort(order)` undoes it. Raises ShardingError where the length
    does not divide.
    """
    chunks = Chunks.across(length, shards, split)
    runs = np.arange(length, dtype=np.int32).reshape(-1, chunks.length)
    return runs[[chunks.at(shard, slot) for shard in range(shards) for slot in range(chunks.per_shard)]].reshape(-1)
