"""flash_attention: causal self-attention over whole sequences, for training and scoring. Checks and dispatch only."""

from __future__ import annotations

from typing import Literal, overload

from jaxtyping import Array, Float, Int

from .reference import flash_attention_reference
from .xla.flash import flash_attention_xla

Implementation = Literal["auto", "reference", "xla"]
IMPLEMENTATIONS = {"reference": flash_attention_reference, "xla": flash_attention_xla}


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
      implementation: "reference" (dense, float32), "xla" (blockwise), or "auto".

    Returns the mixed values in the dtype of q, and the log-sum-exp [B, T, N] if asked for.

    Raises ValueError, before anything is traced further, for arguments that do not fit together.
    """
    _check(q, k, v, window, implementation)
    query_segments, key_segments = _split_segments(segment_ids, q, k)
    run = IMPLEMENTATIONS["xla" if implementation == "auto" else implementation]
    out, lse = run(
        q,
        k,
        v,
        window=window,
        query_segments=query_segments,
        key_segments=key_segments,
        query_offset=query_offset,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
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
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head width {k.shape[-1]}, q has {q.shape[-1]}: they must be equal")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has batch, length and heads {v.shape[:3]}, k has {k.shape[:3]}: they must be equal")
    check_heads_and_window(q.shape[2], k.shape[2], window)
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected 'auto' or one of {sorted(IMPLEMENTATIONS)}")


def _split_segments(
    segment_ids: Array | tuple[Array, Array] | None, q: Array, k: Array
) -> tuple[Array, Array] | tuple[None, None]:
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple):
        return segment_ids
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids is one array but q has {q.shape[1]} rows and k has {k.shape[1]}: give a pair (queries, keys)"
        )
    return segment_ids, segment_ids
