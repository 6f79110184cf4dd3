"""The operations written for the reader: dense, masked, float32. They define what the others must equal.

Nothing here is meant to be fast: scores of every query against every key, and a matrix for every row, are held at once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from .visibility import visible

FP8_BLOCK = 128  # inputs, and outputs, that have a scale of their own


def masked_softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Softmax attention under `mask` and its log-sum-exp, both in float32.

    Query head n reads key head `n // (N / K)`. Rows that see nothing give zeros and a log-sum-exp of -inf. Masked
    keys and values may be NaN: they are replaced before any product.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    seen_by_any = mask.any(axis=1)[:, :, None, None]
    k = jnp.where(seen_by_any, k.astype(jnp.float32), 0.0)
    v = jnp.where(seen_by_any, v.astype(jnp.float32), 0.0)
    grouped = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, precision=precision) * scale
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights / jnp.where(total > 0, total, 1.0), v, precision=precision)
    lse = jnp.log(total) + jnp.where(jnp.isfinite(top), top, 0.0)
    return mixed.reshape(B, T, N, -1), lse[..., 0].transpose(0, 3, 1, 2).reshape(B, T, N)


def flash_attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    scale: float,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """`flash_attention` by definition. Query i stands at position `query_offset + i`, key j at position j."""
    (B, T), S = q.shape[:2], k.shape[1]
    positions = query_offset + jnp.arange(T, dtype=jnp.int32)
    mask = visible(positions[:, None], jnp.arange(S, dtype=jnp.int32)[None, :], window)[None]  # [1, T, S]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    out, lse = masked_softmax_attention(q, k, v, jnp.broadcast_to(mask, (B, T, S)), scale)
    return out.astype(q.dtype), lse


def flash_gradients_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    d_out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    *,
    window: int | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """`flash_attention_gradients` by definition, in float32: what these keys add to each gradient."""
    (B, T, N, H), K = q.shape, k.shape[2]
    positions = query_offset + jnp.arange(T, dtype=jnp.int32)
    mask = visible(positions[:, None], jnp.arange(k.shape[1], dtype=jnp.int32)[None, :], window)[None]  # [1, T, S]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    queries, d_mixed = (x.astype(jnp.float32).reshape(B, T, K, N // K, -1) for x in (q, d_out))
    lse, delta = (x.reshape(B, T, K, N // K).transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))  # [B, K, G, T, 1]
    scores = product("BTKGH,BSKH->BKGTS", queries, keys) * scale
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0.0)), 0.0)
    d_scores = weights * (product("BTKGH,BSKH->BKGTS", d_mixed, values) - delta) * scale
    dq = product("BKGTS,BSKH->BTKGH", d_scores, keys).reshape(B, T, N, H)
    dk = product("BKGTS,BTKGH->BSKH", d_scores, queries)
    dv = product("BKGTS,BTKGH->BSKH", weights, d_mixed)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def token_positions(
    query_starts: Int[Array, "B_plus_1"], lengths: Int[Array, "B"], n_tokens: int
) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """For each packed query row: its sequence and its position, both -1 for padding rows.

    Rows `query_starts[b] .. query_starts[b+1]-1` are the last queries of sequence b, so the i-th of its n rows stands
    at position `lengths[b] - n + i`. Rows from `query_starts[-1]` on are padding.
    """
    row = jnp.arange(n_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(query_starts, row, side="right", method="compare_all").astype(jnp.int32) - 1
    real = row < query_starts[-1]
    safe = jnp.clip(sequence, 0, lengths.shape[0] - 1)
    position = lengths[safe] - query_starts[safe + 1] + row
    return jnp.where(real, safe, -1), jnp.where(real, position, -1)


def paged_attention_reference(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None,
    scale: float,
    k_scale: Float[Array, "K"] | None,
    v_scale: Float[Array, "K"] | None,
    value_width: int | None = None,
) -> tuple[Float[Array, "T N value"], Float[Array, "T N"]]:
    """`paged_attention` by definition: every query row gathers the whole page table of its sequence and masks."""
    T, page = q.shape[0], k_pages.shape[1]
    sequence, position = token_positions(query_starts, lengths, T)
    rows = page_table[jnp.clip(sequence, 0)]  # [T, pages]
    keys = scaled(k_pages[rows], k_scale).reshape(T, -1, *k_pages.shape[2:])  # [T, S, K, H]
    if v_pages is None:
        values = keys[..., :value_width]
    else:
        values = scaled(v_pages[rows], v_scale).reshape(T, -1, *v_pages.shape[2:])
    at = jnp.arange(rows.shape[1] * page, dtype=jnp.int32)
    mask = visible(position[:, None], at[None, :], window) & (position >= 0)[:, None]  # [T, S]
    out, lse = masked_softmax_attention(q[:, None], keys, values, mask[:, None], scale)
    return out[:, 0].astype(q.dtype), lse[:, 0]


def scaled(entries: Num[Array, "*rows K H"], scale: Float[Array, "K"] | None) -> Float[Array, "*rows K H"]:
    """What stored entries stand for, in float32."""
    numbers = entries.astype(jnp.float32)
    return numbers if scale is None else numbers * scale[:, None]


def grouped_matmul_reference(
    x: Float[Array, "M I"], w: Float[Array, "E O I"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M O"]:
    """Each row times the transposed matrix of its group, in float32; zeros for rows past the last group."""
    inside = in_a_group(len(x), group_sizes)[:, None]
    groups = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(x)), side="right")
    known = jnp.where(inside, x.astype(jnp.float32), 0.0)
    matrices = w.astype(jnp.float32)[jnp.minimum(groups, len(w) - 1)]  # [M, O, I]
    out = jnp.einsum("MI,MOI->MO", known, matrices, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(inside, out, 0.0).astype(x.dtype)


def grouped_matmul_fp8_reference(
    x: Float[Array, "M I"],
    x_scale: Float[Array, "M blocks"],
    w: Float[Array, "E O I"],
    w_scale: Float[Array, "E row_blocks blocks"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "M O"]:
    """The same of numbers times the scale of their block of 128, rounded to bfloat16."""
    wide_x = x.astype(jnp.float32) * jnp.repeat(x_scale, FP8_BLOCK, axis=1)
    wide_w = w.astype(jnp.float32) * jnp.repeat(jnp.repeat(w_scale, FP8_BLOCK, axis=1), FP8_BLOCK, axis=2)
    return grouped_matmul_reference(wide_x, wide_w, group_sizes).astype(jnp.bfloat16)


def in_a_group(n_rows: int, group_sizes: Int[Array, "E"]) -> Bool[Array, "M"]:
    """Which rows are not past the last group."""
    return jnp.arange(n_rows) < jnp.sum(group_sizes)
