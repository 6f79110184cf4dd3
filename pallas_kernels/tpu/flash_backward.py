"""The backward flash-attention kernels for TPU: one for the queries, one for the keys and values.

Both recompute the probabilities from the log-sum-exp and walk over nothing but the blocks that the window leaves. Like
the forward kernel they hold scores transposed, keys down the sublanes and queries along the lanes: what belongs to a
query (its log-sum-exp, its delta) is then a row that broadcasts for free. In base 2 with P the probabilities,

    dS = P * (dO V^T - delta)        delta = sum(dO * O) - dLSE
    dQ = scale * dS K                dK = scale * dS^T Q                dV = P^T dO
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .launch import BlockSpecs, kernel_cost
from .tiles import Call, Scalars, dot, for_each_tile, for_each_unit, rows_of, scores, tile_mask


class Operands(NamedTuple):
    """What both kernels read. `lse` is in base 2 and finite, `delta` as above; all are zero in padding."""

    q: Float[Array, "B K G T H"]
    d_out: Float[Array, "B K G T Hv"]
    lse: Float[Array, "B K G 1 T"]
    delta: Float[Array, "B K G 1 T"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S Hv"]


def _dq_kernel(call: Call, *refs: Any) -> None:
    """One (batch, key head, query block, step) of the grid; the steps of a query block run in order."""
    scalars, inputs, (dq_ref, acc_ref) = Scalars.split(call, refs, inputs=7)
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, k_columns_ref, v_ref, *segments = inputs
    batch, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = scalars.row(call, batch, i, call.extent.query_blocks)
    j = scalars.start[row] + step

    @pl.when(step == 0)
    def _start() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def one_tile(tile: Array, masked: bool) -> None:
        at = rows_of(call, tile)
        keys, values, key_columns = k_ref[at, :], v_ref[at, :], k_columns_ref[:, at]
        mask = tile_mask(call, scalars, i, j, tile, tuple(segments)) if masked else None

        def products(g: int, lanes: slice) -> tuple[Array, Array]:
            unit_scores = scores(call, keys, q_ref[g, lanes, :], None if mask is None else mask[:, lanes])
            return unit_scores, dot(values, d_out_ref[g, lanes, :], (1, 1))  # [keys, lanes] both

        def add(g: int, lanes: slice, ready: tuple[Array, Array]) -> None:
            unit_scores, d_probs = ready
            d_scores = jnp.exp2(unit_scores - lse_ref[g, :, lanes]) * (d_probs - delta_ref[g, :, lanes])
            acc_ref[g, :, lanes] += dot(key_columns, d_scores.astype(keys.dtype), (1, 0))  # [H, lanes]

        for_each_unit(call, products, add)

    for_each_tile(call, scalars, batch, i, j, j < scalars.stop[row], one_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish() -> None:
        @pl.loop(0, call.groups)
        def _head(g: Array) -> None:
            dq_ref[g] = (acc_ref[g] * call.scale).T.astype(dq_ref.dtype)


def dq_call(call: Call, scalars: Scalars, operands: Operands, segments: tuple[Array, ...]) -> Float[Array, "B K G T H"]:
    """Gradient of the queries."""
    q, d_out, lse, delta, k, v = operands
    G, H, Hv = q.shape[2], q.shape[4], v.shape[3]
    specs = BlockSpecs(call, "query")
    (dq,) = specs.launch(
        functools.partial(_dq_kernel, call),
        "flash_attention_dq",
        scalars,
        [
            (q, specs.queries(H)),
            (d_out, specs.queries(Hv)),
            (lse, specs.statistic()),
            (delta, specs.statistic()),
            (k, specs.keys(H)),
            (k.swapaxes(2, 3), specs.key_columns(H)),
            (v, specs.keys(Hv)),
        ],
        segments,
        outputs=[(jax.ShapeDtypeStruct(q.shape, q.dtype), specs.queries(H))],
        scratch=[pltpu.VMEM((G, H, call.extent.query_block), jnp.float32)],
        cost=kernel_cost(call, q, k, Hv, products=(2, 1)),
    )
    return dq


def _dkv_kernel(call: Call, *refs: Any) -> None:
    """One (batch, key head, key block, step) of the grid; the steps of a key block run in order."""
    scalars, inputs, (dk_ref, dv_ref, dk_acc_ref, dv_acc_ref) = Scalars.split(call, refs, inputs=6)
    q_ref, d_out_ref, lse_ref, delta_ref, k_ref, v_ref, *segments = inputs
    batch, j, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = scalars.row(call, batch, j, call.extent.key_blocks)
    i = scalars.start[row] + step

    @pl.when(step == 0)
    def _start() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def one_tile(tile: Array, masked: bool) -> None:
        at = rows_of(call, tile)
        keys, values = k_ref[at, :], v_ref[at, :]
        mask = tile_mask(call, scalars, i, j, tile, tuple(segments)) if masked else None
        dk, dv = dk_acc_ref[at, :], dv_acc_ref[at, :]
        for g, lanes in call.units:
            unit_mask = None if mask is None else mask[:, lanes]
            queries, d_out = q_ref[g, lanes, :], d_out_ref[g, lanes, :]
            probs = jnp.exp2(scores(call, keys, queries, unit_mask) - lse_ref[g, :, lanes])  # [keys, lanes]
            dv += dot(probs.astype(d_out.dtype), d_out, (1, 0))
            d_scores = probs * (dot(values, d_out, (1, 1)) - delta_ref[g, :, lanes])
            dk += dot(d_scores.astype(queries.dtype), queries, (1, 0))
        dk_acc_ref[at, :], dv_acc_ref[at, :] = dk, dv

    for_each_tile(call, scalars, batch, i, j, i < scalars.stop[row], one_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish() -> None:
        dk_ref[...] = (dk_acc_ref[...] * call.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


def dkv_call(
    call: Call, scalars: Scalars, operands: Operands, segments: tuple[Array, ...]
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """Gradients of keys and values, summed over the query heads of each key head."""
    q, d_out, lse, delta, k, v = operands
    H, Hv, bk = k.shape[3], v.shape[3], call.extent.key_block
    specs = BlockSpecs(call, "key")
    return specs.launch(
        functools.partial(_dkv_kernel, call),
        "flash_attention_dkv",
        scalars,
        [
            (q, specs.queries(H)),
            (d_out, specs.queries(Hv)),
            (lse, specs.statistic()),
            (delta, specs.statistic()),
            (k, specs.keys(H)),
            (v, specs.keys(Hv)),
        ],
        segments,
        outputs=[
            (jax.ShapeDtypeStruct(k.shape, k.dtype), specs.keys(H)),
            (jax.ShapeDtypeStruct(v.shape, v.dtype), specs.keys(Hv)),
        ],
        scratch=[pltpu.VMEM((bk, H), jnp.float32), pltpu.VMEM((bk, Hv), jnp.float32)],
        cost=kernel_cost(call, q, k, Hv, products=(2, 2)),
    )
