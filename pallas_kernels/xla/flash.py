"""Blockwise flash_attention in jax.numpy: O(T * W) work, O(T) memory, with its own gradient.

The algorithm is FlashAttention-2 (Dao 2023, arXiv 2307.08691): query blocks one after the other, an online softmax over
the key blocks that the window leaves, and a backward pass that recomputes the probabilities from the log-sum-exp.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..visibility import key_block_bounds, visible

# 256 rows of queries against 512 keys keep one block's scores of one head (512 KB in float32) inside a core's L2 cache.
QUERY_BLOCK = 256
KEY_BLOCK = 512


class Shape(NamedTuple):
    """What the compiled loops depend on besides array shapes: all static."""

    window: int | None
    scale: float
    query_block: int
    key_block: int
    n_queries: int
    n_keys: int


class Positions(NamedTuple):
    """Where queries and keys stand, and which segments they belong to (zeros where there are none)."""

    offset: Int[Array, ""]
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]


def flash_attention_xla(
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
    """As `flash_attention_reference`, block by block. Differentiable in q, k, v, through both results."""
    (B, T, N, _), S = q.shape, k.shape[1]
    if not T or not S:
        return jnp.zeros((B, T, N, v.shape[-1]), q.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    shape, positions = _blocks(q, k, window, query_segments, key_segments, query_offset, scale)
    keys, values = _heads_first(k, shape.key_block), _heads_first(v, shape.key_block)  # [B, K, S, H]
    both: tuple[Array, Array] = cast(Any, _blockwise)(shape, _grouped(q, k, shape), keys, values, positions)
    out, lse = both
    return _ungrouped(out, q), _ungrouped(lse[..., None], q)[..., 0]


def flash_gradients_xla(
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
    """As `flash_gradients_reference`, block by block. T and S are at least 1."""
    shape, positions = _blocks(q, k, window, query_segments, key_segments, query_offset, scale)
    keys, values = _heads_first(k, shape.key_block), _heads_first(v, shape.key_block)
    rows = (_grouped(x[..., None], k, shape)[..., 0] for x in (lse, delta))  # [B, K, G, T]
    dq, dk, dv = _gradients(shape, _grouped(q, k, shape), keys, values, positions, _grouped(d_out, k, shape), *rows)
    dk, dv = (x[:, :, : k.shape[1]].transpose(0, 2, 1, 3) for x in (dk, dv))
    return _ungrouped(dq, q), dk, dv


def _blocks(
    q: Array,
    k: Array,
    window: int | None,
    query_segments: Array | None,
    key_segments: Array | None,
    query_offset: Array | int,
    scale: float,
) -> tuple[Shape, Positions]:
    (B, T), S = q.shape[:2], k.shape[1]
    shape = Shape(window, scale, min(QUERY_BLOCK, T), min(KEY_BLOCK, S), T, S)
    positions = Positions(
        jnp.asarray(query_offset, jnp.int32),
        _pad(_or_zeros(query_segments, (B, T)), 1, shape.query_block, mode="edge"),
        _pad(_or_zeros(key_segments, (B, S)), 1, shape.key_block, mode="edge"),
    )
    return shape, positions


def _grouped(x: Float[Array, "B T N H"], k: Float[Array, "B S K Hk"], shape: Shape) -> Float[Array, "B K G Tp H"]:
    # Heads in front: each product below is then one batched matrix product per key head, [G * block, H] x [H, block].
    B, T, N, H = x.shape
    K = k.shape[2]
    return _pad(x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4), 3, shape.query_block)


def _ungrouped(x: Float[Array, "B K G Tp H"], q: Float[Array, "B T N Hq"]) -> Float[Array, "B T N H"]:
    B, T, N, _ = q.shape
    return x[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def _heads_first(x: Float[Array, "B S K H"], block: int) -> Float[Array, "B K Sp H"]:
    return _pad(x.transpose(0, 2, 1, 3), 2, block)


def _or_zeros(segments: Int[Array, "B T"] | None, shape: tuple[int, int]) -> Int[Array, "B T"]:
    return jnp.zeros(shape, jnp.int32) if segments is None else segments.astype(jnp.int32)


def _pad(x: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, mode=mode)


def _slice(x: Array, start: Array | int, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _block_mask(
    shape: Shape, positions: Positions, q_start: Array, k_start: Array
) -> Bool[Array, "B 1 1 query_block key_block"]:
    rows = positions.offset + q_start + jnp.arange(shape.query_block, dtype=jnp.int32)
    columns = k_start + jnp.arange(shape.key_block, dtype=jnp.int32)
    mask = visible(rows[:, None], columns[None, :], shape.window) & (columns < shape.n_keys)[None, :]
    query_segments = _slice(positions.query_segments, q_start, shape.query_block, 1)
    key_segments = _slice(positions.key_segments, k_start, shape.key_block, 1)
    return (mask[None] & (query_segments[:, :, None] == key_segments[:, None, :]))[:, None, None]


def _bounds(shape: Shape, positions: Positions, q_start: Array) -> tuple[Array, Array]:
    """Half-open range of the key blocks that a query block visits: what its positions see, and its segments are in."""
    first = positions.offset + q_start
    last = positions.offset + jnp.minimum(q_start + shape.query_block, shape.n_queries) - 1
    start, stop = key_block_bounds(first, last, shape.n_keys, shape.key_block, shape.window)
    queries = _slice(positions.query_segments, q_start, shape.query_block, 1)  # [B, query_block]
    keys = positions.key_segments.reshape(len(queries), -1, shape.key_block)  # [B, blocks, key_block]
    lowest, highest = queries.min(axis=1, keepdims=True), queries.max(axis=1, keepdims=True)
    meets = (keys.min(axis=-1) <= highest) & (keys.max(axis=-1) >= lowest)  # [B, blocks]
    at = jnp.arange(keys.shape[1], dtype=jnp.int32)
    inside = meets.any(axis=0) & (at >= start) & (at < stop)
    end = keys.shape[1] - jnp.argmax(inside[::-1]).astype(jnp.int32)
    return jnp.argmax(inside).astype(jnp.int32), jnp.where(inside.any(), end, 0)


def _scores(shape: Shape, q: Array, k: Array, mask: Array) -> Float[Array, "B K G query_block key_block"]:
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * shape.scale
    return jnp.where(mask, scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(shape: Shape, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
    return _forward(shape, q, k, v, positions)


def _forward(shape: Shape, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
    """Returns the padded output [B, K, G, T, Hv] in the dtype of q and the log-sum-exp [B, K, G, T] in float32."""
    B, K, G, T, _ = q.shape

    def one_query_block(q_start: Array) -> tuple[Array, Array]:
        q_block = _slice(q, q_start, shape.query_block, 3)

        def one_key_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = carry
            k_start = i * shape.key_block
            mask = _block_mask(shape, positions, q_start, k_start)
            scores = _scores(shape, q_block, _slice(k, k_start, shape.key_block, 2), mask)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            # A row that has seen nothing yet keeps -inf as its maximum; subtracting 0 instead keeps NaN away.
            finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            weights = jnp.exp(scores - finite_top[..., None])
            decay = jnp.exp(top - finite_top)
            v_block = _slice(v, k_start, shape.key_block, 2)
            mixed = jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
            )
            return new_top, total * decay + weights.sum(axis=-1), acc * decay[..., None] + mixed

        rows = (B, K, G, shape.query_block)
        start = (
            jnp.full(rows, -jnp.inf, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, v.shape[-1]), jnp.float32),
        )
        top, total, acc = jax.lax.fori_loop(*_bounds(shape, positions, q_start), one_key_block, start)
        out = acc / jnp.where(total > 0, total, 1.0)[..., None]
        return out.astype(q.dtype), jnp.log(total) + jnp.where(jnp.isfinite(top), top, 0.0)

    starts = jnp.arange(0, T, shape.query_block, dtype=jnp.int32)
    outs, lses = jax.lax.map(one_query_block, starts)  # [blocks, B, K, G, query_block, ...]
    return (
        jnp.moveaxis(outs, 0, 3).reshape(B, K, G, T, -1),
        jnp.moveaxis(lses, 0, 3).reshape(B, K, G, T),
    )


def _forward_with_residuals(
    shape: Shape, q: Array, k: Array, v: Array, positions: Positions
) -> tuple[tuple[Array, Array], tuple[Array | Positions, ...]]:
    out, lse = _forward(shape, q, k, v, positions)
    return (out, lse), (q, k, v, positions, out, lse)


def _backward(shape: Shape, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, Positions]:
    q, k, v, positions, out, lse = residuals
    d_out, d_lse = cotangents
    # dS = P * (dP - sum(dO * O) + dLSE): the last two are one number per row.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, K, G, T]
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), positions)
    return *_gradients(shape, q, k, v, positions, d_out, lse, delta), no_gradient


def _gradients(
    shape: Shape, q: Array, k: Array, v: Array, positions: Positions, d_out: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Gradients of the padded queries [B, K, G, T, H], keys and values [B, K, S, H]."""
    finite_lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

    def one_query_block(carry: tuple[Array, Array], q_start: Array) -> tuple[tuple[Array, Array], Array]:
        q_block = _slice(q, q_start, shape.query_block, 3)
        d_out_block = _slice(d_out, q_start, shape.query_block, 3)
        lse_block = _slice(finite_lse, q_start, shape.query_block, 3)[..., None]
        delta_block = _slice(delta, q_start, shape.query_block, 3)[..., None]

        def one_key_block(i: Array, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_block, dk, dv = inner
            k_start = i * shape.key_block
            k_block, v_block = _slice(k, k_start, shape.key_block, 2), _slice(v, k_start, shape.key_block, 2)
            mask = _block_mask(shape, positions, q_start, k_start)
            probs = jnp.exp(_scores(shape, q_block, k_block, mask) - lse_block)
            f32 = {"preferred_element_type": jnp.float32}
            d_probs = jnp.einsum("BKGTH,BKSH->BKGTS", d_out_block, v_block, **f32)
            d_scores = (probs * (d_probs - delta_block) * shape.scale).astype(q.dtype)
            dq_block += jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k_block, **f32)
            dk_block = _over_queries(d_scores, q_block)
            dv_block = _over_queries(probs.astype(q.dtype), d_out_block)
            return dq_block, _add_at(dk, dk_block, k_start), _add_at(dv, dv_block, k_start)

        dq_start = jnp.zeros(q_block.shape, jnp.float32)
        dq_block, dk, dv = jax.lax.fori_loop(*_bounds(shape, positions, q_start), one_key_block, (dq_start, *carry))
        return (dk, dv), dq_block.astype(q.dtype)

    starts = jnp.arange(0, q.shape[3], shape.query_block, dtype=jnp.int32)
    sums = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq_blocks = jax.lax.scan(one_query_block, sums, starts)
    dq = jnp.moveaxis(dq_blocks, 0, 3).reshape(q.shape)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _over_queries(scores: Float[Array, "B K G T S"], rows: Float[Array, "B K G T H"]) -> Float[Array, "B K S H"]:
    """`scores.T @ rows`, summed over queries and the heads of a group, in float32."""
    if scores.dtype != jnp.float32:
        return jnp.einsum("BKGTS,BKGTH->BKSH", scores, rows, preferred_element_type=jnp.float32)
    # Transposed, with the narrow operand first: XLA's CPU backend copies the first into the order that it contracts in,
    # and for scores that took as long as the product. In 16 bits it cannot run some products that are written so.
    return jnp.einsum("BKGTH,BKGTS->BKHS", rows, scores).mT


def _add_at(total: Array, block: Array, start: Array) -> Array:
    updated = _slice(total, start, block.shape[2], 2) + block
    return jax.lax.dynamic_update_slice_in_dim(total, updated, start, 2)


_blockwise.defvjp(_forward_with_residuals, _backward)
