"""flash_attention: causal self-attention over whole sequences, for training and scoring. Its interface."""

from __future__ import annotations

import typing
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .arguments import check_flash_arrays, check_heads_and_window, check_offset_and_scale, split_segments
from .dispatch import choose, target
from .flash_dispatch import TABLE, FlashProblem, Implementation

__all__ = ["Implementation", "check_heads_and_window", "flash_attention"]


@overload
def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: Int[Array, ""] | int = 0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "B T N Hv"]: ...


@overload
def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: Int[Array, ""] | int = 0,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]: ...


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: Int[Array, ""] | int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Causal grouped-query attention with an optional sliding window.

    The query at row i stands at position `query_offset + i`, the key at row j at position j, and sees it iff
    `0 <= query_offset + i - j < window`. With `segment_ids`, queries do not see keys of other segments.
    Query head n reads key head `n // (N / K)`. A query that sees nothing gives zeros.

    Args:
      q, k, v: queries, keys and values, rotated already. Hv may differ from H.
      window: keys a query sees, itself included; None for all before it.
      segment_ids: one id per position ([B, T], where T equals S), or a pair for queries and keys.
      query_offset: position of the first query among the keys.
      scale: multiplies the scores; None means `H ** -0.5`.
      return_lse: also return the natural log-sum-exp of the scaled scores, float32, -inf where nothing is seen.
      implementation: "auto" picks by device, dtype and shape (the table in flash_dispatch.py) and logs once what it
        passed over; "reference" (dense, float32), "xla" (blockwise), "pallas_tpu", "pallas_gpu", "cudnn" by name.
      interpret: True, or the parameters of the platform's own interpreter, runs a Pallas kernel step by step on CPU.

    Returns the mixed values in the dtype of q, and the log-sum-exp [B, T, N] if asked for.

    Raises ValueError, before anything is traced further, for arguments that do not fit together.
    """
    check_flash_arrays(q, k, v)
    check_heads_and_window(q.shape[2], k.shape[2], window)
    check_offset_and_scale(query_offset, scale)
    query_segments, key_segments = split_segments(segment_ids, q, k)
    names = typing.get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(names)}")
    known_offset = int(query_offset) if isinstance(query_offset, int | np.integer) else None
    problem = FlashProblem(
        target(),
        str(q.dtype),
        (q.shape[-1], v.shape[-1]),
        (q.shape[1], k.shape[1]),
        known_offset,
        query_segments is not None,
        return_lse,
        bool(interpret),
    )
    run = choose("flash_attention", TABLE, implementation, problem)
    out, lse = run(
        *map(jnp.asarray, (q, k, v)),
        window=None if window is None else int(window),
        query_segments=None if query_segments is None else jnp.asarray(query_segments, jnp.int32),
        key_segments=None if key_segments is None else jnp.asarray(key_segments, jnp.int32),
        query_offset=query_offset if known_offset is None else known_offset,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        **({"interpret": interpret} if interpret else {}),
    )
    return (out, lse) if return_lse else out
