"""The TPU paged-attention kernel: one grid step per tile of query rows, an online softmax over its blocks of pages.

Not the copies of pages (paged_fetch.py), nor what is computed of a block (paged_rows.py, paged_lanes.py).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .launch import COMPILER_FLAGS
from .paged_call import PagedCall, Seen
from .paged_fetch import Pipeline
from .paged_lanes import Lanes
from .paged_rows import Rows
from .paged_tiles import TileScalars, loaded_tile


def _kernel(call: PagedCall, *refs: Any) -> None:
    """One tile of the grid."""
    scalars, refs = TileScalars(*refs[: len(TileScalars._fields)]), refs[len(TileScalars._fields) :]
    (constants, q, table, k_pages, v_pages), (out, lse), refs = refs[:5], refs[5:7], refs[7:]
    buffers, fetching, scratch = (refs[0], refs[1]), refs[2:6], refs[6:]
    m, window, block_tokens = pl.program_id(0), call.paging.window, call.paging.block
    pipeline = Pipeline(call.paging, scalars, table, (k_pages, v_pages), buffers, *fetching)
    first = scalars.first[m]
    oldest = jnp.int32(0) if window is None else jnp.maximum(first - (window - 1), 0)
    seen = Seen(first, scalars.last[m], oldest)
    tile = (Rows if call.by_rows else Lanes)(call, seen, constants, q, out, lse, buffers, *scratch)

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
        tile.start()
        pipeline.for_each_block(m, compute)
        tile.finish()


def paged_call(
    call: PagedCall,
    scalars: TileScalars,
    constants: Float[Array, "..."],
    q: Float[Array, "M *rows H"],
    page_table: Any,
    k_pages: Any,
    v_pages: Any,
    cost: pl.CostEstimate,
) -> tuple[Float[Array, "M *rows Hv"], Float[Array, "M ..."]]:
    """Mixed values in the dtype of q, laid out like it, and the natural log-sum-exp, of every tile.

    By rows, q is [M, U, rows, H] and the sums [M, U, rows, 1]; by lanes [M, K, G, tile, H] and [M, K, G, 1, tile].
    """
    (M, *rows, H), Hv, paging = q.shape, v_pages.shape[-1], call.paging
    sums = (*rows, 1) if call.by_rows else (*rows[:-1], 1, rows[-1])

    def per_tile(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, *shape), lambda m, *refs: (loaded_tile(m, TileScalars(*refs)), *zeros))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffers = [pltpu.VMEM((2, paging.pages_per_block, *x.shape[1:]), x.dtype) for x in (k_pages, v_pages)]
    fetching = [
        pltpu.SMEM((2, paging.pages_per_piece), jnp.int32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2, 2)),
    ]
    whole = pl.BlockSpec(
        constants.shape, lambda m, *refs: (0,) * constants.ndim, memory_space=pltpu.VMEM if call.by_rows else pltpu.SMEM
    )
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(M,),
            in_specs=[whole, per_tile(*rows, H), *[anywhere] * 3],
            out_specs=[per_tile(*rows, Hv), per_tile(*sums)],
            scratch_shapes=[*buffers, *fetching, *(Rows if call.by_rows else Lanes).scratch(call, H, Hv, q.dtype)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((M, *rows, Hv), q.dtype),
            jax.ShapeDtypeStruct((M, *sums), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=call.vmem_limit_bytes, flags=COMPILER_FLAGS
        ),
        cost_estimate=cost,
        interpret=call.interpret,
        name=f"paged_attention_{'rows' if call.by_rows else 'lanes'}",
    )(*scalars, constants, q, page_table, k_pages, v_pages)
