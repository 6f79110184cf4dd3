"""The forward flash-attention kernel for TPU: one pallas_call, queries along the lanes.

Scores are computed transposed, keys down the sublanes and queries along the lanes: the softmax then reduces over
sublanes, its statistics are one row of lanes per query head, and nothing crosses lanes. The N / K query heads of a key
head are visited together, so that a block of keys is loaded once for all of them, and the edges of a window waste less.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .launch import BlockSpecs, kernel_cost
from .tiles import LOG2_E, Call, Scalars, dot, for_each_tile, for_each_unit, rows_of, scores, tile_mask

# Where the running maximum starts: below any score, yet finite, so that a query that has seen nothing gives
# exp2(-inf - LOWEST_TOP) = 0 and never NaN.
LOWEST_TOP = -1e30


def _forward_kernel(call: Call, *refs: Any) -> None:
    """One (batch, key head, query block, step) of the grid; the steps of a query block run in order."""
    scalars, (q_ref, k_ref, v_ref, *segments), outputs = Scalars.split(call, refs, inputs=3)
    out_ref, lse_ref, acc_ref, top_ref, total_ref = outputs
    batch, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = scalars.row(call, batch, i, call.extent.query_blocks)
    j = scalars.start[row] + step

    @pl.when(step == 0)
    def _start() -> None:
        @pl.loop(0, call.groups)
        def _head(g: Array) -> None:
            acc_ref[g] = jnp.zeros(acc_ref.shape[1:], acc_ref.dtype)
            top_ref[g] = jnp.full(top_ref.shape[1:], LOWEST_TOP, top_ref.dtype)
            total_ref[g] = jnp.zeros(total_ref.shape[1:], total_ref.dtype)

    def one_tile(tile: Array, masked: bool) -> None:
        keys, values = k_ref[rows_of(call, tile), :], v_ref[:, rows_of(call, tile)]  # [keys, H], [Hv, keys]
        mask = tile_mask(call, scalars, i, j, tile, tuple(segments)) if masked else None

        def scores_of(g: int, lanes: slice) -> Array:
            return scores(call, keys, q_ref[g, lanes, :], None if mask is None else mask[:, lanes])

        def add(g: int, lanes: slice, unit_scores: Array) -> None:
            top = top_ref[g, :, lanes]  # [1, lanes]; the scores are [keys, lanes]
            new_top = jnp.maximum(top, unit_scores.max(axis=0, keepdims=True))
            weights = jnp.exp2(unit_scores - new_top)
            decay = jnp.exp2(top - new_top)
            mixed = dot(values, weights.astype(values.dtype), (1, 0))  # [Hv, lanes]
            top_ref[g, :, lanes] = new_top
            total_ref[g, :, lanes] = total_ref[g, :, lanes] * decay + weights.sum(axis=0, keepdims=True)
            acc_ref[g, :, lanes] = acc_ref[g, :, lanes] * decay + mixed

        for_each_unit(call, scores_of, add)

    for_each_tile(call, scalars, batch, i, j, j < scalars.stop[row], one_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _finish() -> None:
        @pl.loop(0, call.groups)
        def _head(g: Array) -> None:
            total = total_ref[g]  # [1, queries]
            seen = total > 0
            mixed = acc_ref[g] / jnp.where(seen, total, 1.0)  # [Hv, queries]
            out_ref[g] = mixed.T.astype(out_ref.dtype)
            lse_ref[g] = jnp.where(seen, (top_ref[g] + jnp.log2(total)) / LOG2_E, -jnp.inf)


def forward_call(
    call: Call,
    scalars: Scalars,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K Hv S"],
    segments: tuple[Array, ...],
) -> tuple[Float[Array, "B K G T Hv"], Float[Array, "B K G 1 T"]]:
    """Mixed values in the dtype of q and the natural log-sum-exp. T and S are multiples of the blocks."""
    B, K, G, T, H = q.shape
    Hv, bq = v.shape[2], call.extent.query_block
    specs = BlockSpecs(call, "query")
    return specs.launch(
        functools.partial(_forward_kernel, call),
        "flash_attention_forward",
        scalars,
        [(q, specs.queries(H)), (k, specs.keys(H)), (v, specs.key_columns(Hv))],
        segments,
        outputs=[
            (jax.ShapeDtypeStruct((B, K, G, T, Hv), q.dtype), specs.queries(Hv)),
            (jax.ShapeDtypeStruct((B, K, G, 1, T), jnp.float32), specs.statistic()),
        ],
        scratch=[pltpu.VMEM((G, Hv, bq), jnp.float32), *[pltpu.VMEM((G, 1, bq), jnp.float32)] * 2],
        cost=kernel_cost(call, q, k, v.shape[2], products=(1, 1)),
    )
