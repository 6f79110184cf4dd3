"""flash_attention: causal self-attention over whole sequences, for training and scoring. Its interface and checks."""

from __future__ import annotations

import typing
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    _check(q, k, v, window, implementation)
    query_segments, key_segments = _split_segments(segment_ids, q, k)
    problem = FlashProblem(
        target(),
        str(q.dtype),
        (q.shape[-1], v.shape[-1]),
        (q.shape[1], k.shape[1]),
        int(query_offset) if isinstance(query_offset, int | np.integer) else None,
        query_segments is not None,
        return_lse,
        bool(interpret),
    )
    run = choose("flash_attention", TABLE, implementation, problem)
    out, lse = run(
        q,
        k,
        v,
        window=window,
        query_segments=query_segments,
        key_segments=key_segments,
        query_offset=query_offset,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        **({"interpret": interpret} if interpret else {}),
    )
    return (out, lse) if return_lse else out


def check_heads_and_window(n_query_heads: int, n_key_heads: int, window: int | None) -> None:
    """Raises ValueError unless query heads divide evenly over key heads and the window is None or positive."""
    if n_query_heads % n_key_heads:
        raise ValueError(
            f"q has {n_query_heads} heads, k has {n_key_heads}: the first must be a multiple of the second"
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected None or at least 1 (a token always sees itself)")


def _check(q: Array, k: Array, v: Array, window: int | None, implementation: str) -> None:
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}: expected a floating-point dtype")
    for name, array in {"k": k, "v": v}.items():
        if array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}, q is {q.dtype}: they must be equal")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}, q has {q.shape[0]}: they must be equal")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head width {k.shape[-1]}, q has {q.shape[-1]}: they must be equal")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has batch, length and heads {v.shape[:3]}, k has {k.shape[:3]}: they must be equal")
    check_heads_and_window(q.shape[2], k.shape[2], window)
    names = typing.get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(names)}")


def _split_segments(
    segment_ids: Array | tuple[Array, Array] | None, q: Array, k: Array
) -> tuple[Array, Array] | tuple[None, None]:
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple):
        for of, ids, rows in zip("qk", segment_ids, (q, k), strict=True):
            if ids.shape != rows.shape[:2]:
                raise ValueError(f"segment_ids for {of} are {ids.shape}, expected batch and length {rows.shape[:2]}")
        return segment_ids
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids is one array but q has {q.shape[1]} rows and k has {k.shape[1]}: give a pair (queries, keys)"
        )
    if segment_ids.shape != q.shape[:2]:
        raise ValueError(f"segment_ids are {segment_ids.shape}, expected batch and length {q.shape[:2]}")
    return segment_ids, segment_ids
