"""The TPU paged-attention kernel: one grid step per tile of query rows, an online softmax over its blocks of pages.

Not the copies of pages (paged_fetch.py), nor the layout of arrays around the call (paged.py).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from ..visibility import visible
from .flash_forward import LOWEST_TOP
from .paged_fetch import Paging, Pipeline
from .paged_tiles import TileScalars, loaded_tile
from .tiles import LOG2_E, dot


class PagedCall(NamedTuple):
    """Everything static about one kernel call.

    A unit is what one matrix product sees: the rows of one key head, or (`units` 1) of all, whose scores against the
    entries of other heads are masked. `head_major` pools are [P, K, page, H] in memory, others [P, page, K, H].
    """

    paging: Paging
    kv_heads: int
    units: int
    head_major: bool
    chunk: int  # tokens computed at once
    interpret: Any
    vmem_limit_bytes: int

    @property
    def heads_per_unit(self) -> int:
        return self.kv_heads // self.units


# Columns of the array of row constants.
K_FACTOR, V_FACTOR, TOKEN, HEAD = range(4)


def _entries(call: PagedCall, buffer: Any, slot: Array, unit: int, start: int, dtype: Any) -> Num[Array, "entries H"]:
    """Keys or values of one unit: `chunk` tokens from `start` on, the heads of a token one after the other."""
    width, block = buffer.shape[-1], call.paging.block
    K, page = call.kv_heads, call.paging.page
    if call.head_major:
        pages = pl.ds(start // page, call.chunk // page)
        found = buffer[slot, pages, unit].reshape(call.chunk, width)
    elif isinstance(call.interpret, pltpu.InterpretParams):  # knows no reshaped references
        found = buffer[slot].reshape(block, K, width)[start : start + call.chunk]
        found = found.reshape(-1, width) if call.units == 1 else found[:, unit]
    elif call.units == 1:
        found = buffer.reshape(2 * block * K, width)[pl.ds((slot * block + start) * K, call.chunk * K), :]
    else:
        found = buffer.reshape(2 * block, K, width)[pl.ds(slot * block + start, call.chunk), unit, :]
    return found.astype(dtype)


def _kernel(call: PagedCall, *refs: Any) -> None:
    """One tile of the grid."""
    scalars, (rows_ref, q_ref, table, *pools, out_ref, lse_ref, k_buffer, v_buffer), rest = (
        TileScalars(*refs[:5]),
        refs[5:14],
        refs[14:],
    )
    entries, counts, table_semaphores, page_semaphores, acc_ref, top_ref, total_ref = rest
    m = pl.program_id(0)
    pipeline = Pipeline(
        call.paging,
        scalars,
        table,
        (pools[0], pools[1]),
        (k_buffer, v_buffer),
        entries,
        counts,
        table_semaphores,
        page_semaphores,
    )
    window, n, rows = call.paging.window, call.heads_per_unit, q_ref.shape[1]
    first, last = scalars.first[m], scalars.last[m]
    oldest = jnp.int32(0) if window is None else jnp.maximum(first - (window - 1), 0)

    def one_chunk(block: Array, slot: Array, start: int, unit: int, masked: bool) -> None:
        constants = rows_ref[unit]  # [rows, 4]
        keys = _entries(call, k_buffer, slot, unit, start, q_ref.dtype)  # [entries, H]
        values = _entries(call, v_buffer, slot, unit, start, q_ref.dtype)
        base = block * call.paging.block + start
        column = jax.lax.broadcasted_iota(jnp.int32, (1, call.chunk * n), 1)
        scores = dot(q_ref[unit], keys, (1, 1)) * constants[:, K_FACTOR : K_FACTOR + 1]  # [rows, entries]
        if n > 1:
            own = jax.lax.rem(column, jnp.int32(n)) == constants[:, HEAD : HEAD + 1].astype(jnp.int32)
            scores = jnp.where(own, scores, -jnp.inf)
        if masked:
            query = first + constants[:, TOKEN : TOKEN + 1].astype(jnp.int32)
            seen = visible(query, base + jax.lax.div(column, jnp.int32(n)), window)
            scores = jnp.where(seen, scores, -jnp.inf)
            at = base + jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, values.shape, 0), jnp.int32(n))
            values = jnp.where((at >= oldest) & (at <= last), values, jnp.zeros_like(values))
        top = top_ref[unit]  # [rows, 1]
        new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        decay = jnp.exp2(top - new_top)
        top_ref[unit] = new_top
        total_ref[unit] = total_ref[unit] * decay + weights.sum(axis=1, keepdims=True)
        acc_ref[unit] = acc_ref[unit] * decay + dot(weights.astype(values.dtype), values, (1, 0))

    def one_block(block: Array, slot: Array) -> None:
        begin = block * call.paging.block
        bare = (begin >= jnp.maximum(last - ((window or 0) - 1), 0) if window is not None else True) & (
            begin + call.paging.block - 1 <= first
        )
        for masked in (False, True):

            @pl.when(bare != masked)
            def _compute(masked: bool = masked) -> None:
                for start in range(0, call.paging.block, call.chunk):
                    for unit in range(call.units):
                        one_chunk(block, slot, start, unit, masked)

    @pl.when(m < scalars.used[0])
    def _tile() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, acc_ref.dtype)
        top_ref[...] = jnp.full(top_ref.shape, LOWEST_TOP, top_ref.dtype)
        total_ref[...] = jnp.zeros(total_ref.shape, total_ref.dtype)
        pipeline.for_each_block(m, one_block)
        for unit in range(call.units):
            total = total_ref[unit]
            seen = total > 0
            factor = rows_ref[unit][:, V_FACTOR : V_FACTOR + 1] / jnp.where(seen, total, 1.0)
            out_ref[unit] = (acc_ref[unit] * factor).astype(out_ref.dtype)
            lse_ref[unit] = jnp.where(seen, (top_ref[unit] + jnp.log2(total)) / LOG2_E, -jnp.inf)


def paged_call(
    call: PagedCall,
    scalars: TileScalars,
    row_constants: Float[Array, "U rows 4"],
    q: Float[Array, "M U rows H"],
    page_table: Any,
    k_pages: Any,
    v_pages: Any,
    cost: pl.CostEstimate,
) -> tuple[Float[Array, "M U rows Hv"], Float[Array, "M U rows 1"]]:
    """Mixed values in the dtype of q and the natural log-sum-exp, of every tile."""
    (M, U, rows, H), Hv, paging = q.shape, v_pages.shape[-1], call.paging

    def per_tile(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, U, rows, width), lambda m, *refs: (loaded_tile(m, TileScalars(*refs)), 0, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(M,),
            in_specs=[
                pl.BlockSpec(row_constants.shape, lambda m, *refs: (0, 0, 0)),
                per_tile(H),
                *[anywhere] * 3,
            ],
            out_specs=[per_tile(Hv), per_tile(1)],
            scratch_shapes=[
                *[pltpu.VMEM((2, paging.pages_per_block, *pool.shape[1:]), pool.dtype) for pool in (k_pages, v_pages)],
                pltpu.SMEM((2, paging.pages_per_piece), jnp.int32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2, 2)),
                pltpu.VMEM((U, rows, Hv), jnp.float32),
                *[pltpu.VMEM((U, rows, 1), jnp.float32)] * 2,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((M, U, rows, Hv), q.dtype),
            jax.ShapeDtypeStruct((M, U, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=call.vmem_limit_bytes
        ),
        cost_estimate=cost,
        interpret=call.interpret,
        name="paged_attention",
    )(*scalars, row_constants, q, page_table, k_pages, v_pages)
