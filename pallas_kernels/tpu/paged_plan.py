"""How a paged-attention call on TPU is divided, by shapes alone: kernel calls, blocks of pages, tiles of queries.

Sizes were chosen without a chip, from the machine code of a v6e (benchmarks/LOG.md). None was timed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .block_sizes import LANES, MIB, USABLE_SHARE, VMEM_BYTES, Generation
from .paged_call import PagedCall
from .paged_fetch import Paging
from .paged_kernel import vector_memory
from .paged_tiles import tile_count


class PagedSizes(NamedTuple):
    """How a call is cut.

    block_bytes: keys and values fetched together; two such blocks are held.
    block_tokens: the most tokens of a block.
    row_entries: entries, of all heads of a unit, per matrix product by rows.
    packed_scores: rows times key heads up to which a tile is computed by rows.
    row_tokens: the most tokens of a tile computed by rows.
    tile_rows: rows per key head of a tile computed by lanes.
    lanes: queries of one head whose scores are computed at once.
    chunk: tokens laid out by heads at once.
    table_piece: page-table entries fetched together.
    """

    block_bytes: int = 2 * MIB
    block_tokens: int = 512
    row_entries: int = 1024
    packed_scores: int = 1024
    row_tokens: int = 8
    tile_rows: int = 1024
    lanes: int = LANES
    chunk: int = 128
    table_piece: int = 1024


class Shapes(NamedTuple):
    """Shapes and dtypes of a call."""

    dtype: Any
    pool_dtypes: tuple[Any, Any]
    T: int
    B: int
    N: int
    K: int
    H: int
    Hv: int
    page: int
    pages: int  # entries per sequence of the page table
    window: int | None

    @property
    def head_major(self) -> bool:
        """Whether XLA keeps pools [P, page, K, H] as [P, K, page, H], since K heads do not fill its tiles of rows."""
        packing = 4 // min(jnp.dtype(x).itemsize for x in self.pool_dtypes)
        return self.K % 8 != 0 and (self.K not in (1, 2, 4) or packing > self.K)


class Part(NamedTuple):
    """One kernel call: its static description, the most tiles it may need, and which sequences it serves."""

    call: PagedCall
    most: int
    least_queries: int  # sequences with so many queries
    most_queries: int
    cost: pl.CostEstimate


def plan(shapes: Shapes, chip: Generation, interpret: Any, sizes: PagedSizes) -> list[Part]:
    """The kernel calls that together serve every query.

    Few queries per sequence are one call by rows. Otherwise sequences with one query are decoded by rows, and the
    others computed by lanes. Raises ValueError where not even single pages fit the vector memory.
    """
    T, B, N, K = shapes.T, shapes.B, shapes.N, shapes.K
    if not T or not B:
        return []
    share = 1 << (-(-T // B) - 1).bit_length()
    if share <= max(min(sizes.row_tokens, sizes.packed_scores // (N * K)), 1):
        return [_part(shapes, chip, interpret, sizes, share, True, (1, T))]
    tile = min(1 << (T - 1).bit_length(), power_of_two(sizes.tile_rows * K // N))
    by_lanes = _part(shapes, chip, interpret, sizes, max(tile, sizes.lanes), False, (1 if B == 1 else 2, T))
    return [by_lanes] if B == 1 else [_part(shapes, chip, interpret, sizes, 1, True, (1, 1)), by_lanes]


def power_of_two(n: int) -> int:
    """The largest power of two that is not above n, and 1 for n < 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def _part(
    shapes: Shapes,
    chip: Generation,
    interpret: Any,
    sizes: PagedSizes,
    tile: int,
    by_rows: bool,
    queries: tuple[int, int],
) -> Part:
    usable = int(VMEM_BYTES[chip] * USABLE_SHARE)
    while True:
        call = _call(shapes, interpret, sizes, tile, by_rows)
        needed = vector_memory(call, shapes.H, shapes.Hv, shapes.dtype, shapes.pool_dtypes)
        if needed <= usable:
            break
        if not by_rows and call.paging.block <= sizes.chunk and tile > sizes.lanes:
            tile //= 2
            continue
        if call.paging.pages_per_block == 1:
            raise ValueError(
                f"pages of {shapes.page} tokens with {shapes.K} key heads of width {shapes.H}/{shapes.Hv} need "
                f"{needed / MIB:.1f} MiB of vector memory, {chip} has {usable / MIB:.0f} MiB to plan with"
            )
        sizes = sizes._replace(block_tokens=call.paging.block // 2)
    call = call._replace(vmem_limit_bytes=min(VMEM_BYTES[chip] - 4 * MIB, 2 * needed + 8 * MIB))
    rows = min(shapes.B, shapes.T) if queries[1] == 1 else shapes.T
    most = rows if queries[1] == 1 else tile_count(shapes.T, shapes.B, tile)
    return Part(call, most, *queries, _cost(shapes, rows))


def _call(shapes: Shapes, interpret: Any, sizes: PagedSizes, tile: int, by_rows: bool) -> PagedCall:
    """Blocks, pieces and chunks are powers of two of pages, so that none straddles another."""
    page, K = shapes.page, shapes.K
    token_bytes = K * sum(
        width * jnp.dtype(x).itemsize for width, x in zip((shapes.H, shapes.Hv), shapes.pool_dtypes, strict=True)
    )
    per_block = power_of_two(min(sizes.block_tokens, sizes.block_bytes // token_bytes) // page)
    per_piece = max(power_of_two(min(sizes.table_piece, 2 * shapes.pages - 1)), per_block, LANES)
    paging = Paging(page, shapes.pages, per_block, per_piece, shapes.window)
    units = K if shapes.head_major else 1
    tokens = sizes.row_entries * units // K if by_rows else sizes.chunk
    chunk = min(power_of_two(tokens // page), per_block) * page
    return PagedCall(
        paging, K, shapes.N // K, tile, by_rows, units, shapes.head_major, chunk, sizes.lanes, interpret, 0
    )


def _cost(shapes: Shapes, rows: int) -> pl.CostEstimate:
    """Operations and bytes if every sequence filled its row of the page table."""
    held = shapes.pages * shapes.page
    seen = held if shapes.window is None else min(shapes.window, held)
    pairs, width = rows * shapes.N * seen, shapes.H + shapes.Hv
    pools = sum(w * jnp.dtype(x).itemsize for w, x in zip((shapes.H, shapes.Hv), shapes.pool_dtypes, strict=True))
    queries = rows * shapes.N * width * jnp.dtype(shapes.dtype).itemsize
    return pl.CostEstimate(
        flops=2 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=math.ceil(min(shapes.B, rows) * seen * shapes.K * pools + queries),
    )
