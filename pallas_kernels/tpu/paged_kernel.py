"""The TPU paged-attention kernel: one grid step per tile of query rows, an online softmax over its blocks of pages.

Not the copies of pages (paged_fetch.py), nor what is computed of a block (paged_rows.py, paged_lanes.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .block_sizes import LANES
from .launch import COMPILER_FLAGS
from .paged_call import PagedCall, Seen
from .paged_fetch import Pipeline
from .paged_lanes import Lanes
from .paged_queries import Queries
from .paged_rows import Rows
from .paged_tiles import TileScalars

SCALARS = len(TileScalars._fields)
SUBLANES = 8


def _kernel(call: PagedCall, *refs: Any) -> None:
    """One tile of the grid."""
    scalars, (constants, q, _, _, table, *pools) = TileScalars(*refs[:SCALARS]), refs[SCALARS : SCALARS + 7]
    results, buffers, refs = refs[SCALARS + 7 : SCALARS + 9], refs[SCALARS + 9 : SCALARS + 11], refs[SCALARS + 11 :]
    queries = Queries(scalars, q, *results, *refs[4:9])
    pipeline = Pipeline(call.paging, scalars, table, (pools[0], pools[1]), (buffers[0], buffers[1]), *refs[:4])
    m, window, block_tokens = pl.program_id(0), call.paging.window, call.paging.block
    first = scalars.first[m]
    oldest = jnp.int32(0) if window is None else jnp.maximum(first - (window - 1), 0)
    seen = Seen(first, scalars.last(m), oldest)
    tile = (Rows if call.by_rows else Lanes)(call, seen, constants, (buffers[0], buffers[1]), *refs[9:])

    def compute(block: Array, slot: Array) -> None:
        bare = seen.bare(block * block_tokens, block_tokens, window)

        @pl.when(bare)
        def _bare() -> None:
            tile.block(block, slot, masked=False)

        @pl.when(jnp.logical_not(bare))
        def _masked() -> None:
            tile.block(block, slot, masked=True)

    @pl.when(m < scalars.used[0])
    def _tile() -> None:
        tile.start(queries.q_buffers.at[queries.await_queries(m)])
        pipeline.for_each_block(m, compute)
        queries.await_buffers(m)
        tile.finish(queries.out_buffer, queries.lse_buffer)
        queries.store(m)


def _scratch(call: PagedCall, H: int, Hv: int, dtype: Any, pool_dtypes: tuple[Any, Any]) -> list[Any]:
    """Scratch in the order in which `_kernel` takes it."""
    paging, N = call.paging, call.kv_heads * call.groups
    page = (call.kv_heads, paging.page) if call.head_major else (paging.page, call.kv_heads)
    return [
        *[
            pltpu.VMEM((2, paging.pages_per_block, *page, width), x)
            for width, x in zip((H, Hv), pool_dtypes, strict=True)
        ],
        pltpu.SMEM((2 * paging.pages_per_piece,), jnp.int32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2, 2)),
        pltpu.VMEM((2, call.tile, N, H), dtype),
        pltpu.VMEM((call.tile, N, Hv), dtype),
        pltpu.VMEM((call.tile, 1, N), jnp.float32),
        *[pltpu.SemaphoreType.DMA((2,))] * 2,
        *(Rows if call.by_rows else Lanes).scratch(call, H, Hv, dtype),
    ]


def vector_memory(call: PagedCall, H: int, Hv: int, dtype: Any, pool_dtypes: tuple[Any, Any]) -> int:
    """Bytes of vector memory that a call plans with: its scratch, and the scores that are alive at once."""
    refs = [x for x in _scratch(call, H, Hv, dtype, pool_dtypes) if x.memory_space == pltpu.VMEM]
    shape = (call.rows, call.chunk * call.heads_per_unit) if call.by_rows else (3 * call.paging.block, call.lanes)
    return sum(tiled_bytes(x.shape, jnp.dtype(x.dtype).itemsize) for x in refs) + 3 * tiled_bytes(shape, 4)


def tiled_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array in vector memory: columns come in 128 lanes, rows in eights of 32 bit, or packed in fewer."""
    *major, rows, columns = shape
    words = math.ceil(rows * itemsize / 4)
    words = 1 << (words - 1).bit_length() if words < SUBLANES else math.ceil(words / SUBLANES) * SUBLANES
    return math.prod(major) * words * 4 * math.ceil(columns / LANES) * LANES


def paged_call(
    call: PagedCall,
    scalars: TileScalars,
    constants: Float[Array, "..."],
    q: Float[Array, "T N H"],
    results: tuple[Float[Array, "T N Hv"], Float[Array, "T 1 N"]],
    page_table: Int[Array, "B pages"],
    pools: tuple[Any, Any],
    cost: pl.CostEstimate,
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T 1 N"]]:
    """`results` (mixed values, natural log-sum-exp) with the rows of every tile overwritten."""
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    shape, rank = constants.shape, constants.ndim
    space = pltpu.VMEM if call.by_rows else pltpu.SMEM
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=SCALARS,
            grid=scalars.sequence.shape,
            in_specs=[pl.BlockSpec(shape, lambda m, *refs: (0,) * rank, memory_space=space), *[in_hbm] * 6],
            out_specs=[in_hbm] * 2,
            scratch_shapes=_scratch(call, q.shape[-1], pools[1].shape[-1], q.dtype, (pools[0].dtype, pools[1].dtype)),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        input_output_aliases={SCALARS + 2: 0, SCALARS + 3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=call.vmem_limit_bytes,
            flags=None if call.by_rows else COMPILER_FLAGS,
            disable_bounds_checks=True,  # they double the instructions that start a copy; page numbers are clamped
        ),
        cost_estimate=cost,
        interpret=call.interpret,
        name=f"paged_attention_{'rows' if call.by_rows else 'lanes'}",
    )(*scalars, constants, q, *results, page_table, *pools)
