"""How the TPU paged-attention kernel brings pages into vector memory: two buffers, filled by explicit copies.

All blocks of all tiles form one stream: while a block is computed, the next one, be it of the next tile, is on its way.
The page table stays in HBM. It comes in pieces of one sequence, one ahead of the pages that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .paged_tiles import TileScalars

# Pages whose copies are started in straight code: one alone takes 27 instruction bundles, most of them waiting.
PAGES_STARTED = 8


class Paging(NamedTuple):
    """Everything static about the pages of a call."""

    page: int  # tokens
    pages: int  # entries per sequence of the page table
    pages_per_block: int  # pages computed together: a power of two
    pages_per_piece: int  # entries of the page table fetched together: a power of two, at least a block's
    window: int | None

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.page * self.pages_per_block


class Span(NamedTuple):
    """Half-open range of pages or blocks."""

    start: Array
    stop: Array


def page_span(paging: Paging, scalars: TileScalars, m: Array) -> Span:
    """Pages of tile m that hold any key its rows see."""
    page = jnp.int32(paging.page)
    oldest = jnp.int32(0) if paging.window is None else jnp.maximum(scalars.first[m] - (paging.window - 1), 0)
    return Span(jax.lax.div(oldest, page), jnp.minimum(jax.lax.div(scalars.last(m) + page, page), paging.pages))


def block_span(paging: Paging, scalars: TileScalars, m: Array) -> Span:
    """Blocks that hold the pages of `page_span`."""
    pages, n = page_span(paging, scalars, m), jnp.int32(paging.pages_per_block)
    return Span(jax.lax.div(pages.start, n), jax.lax.div(pages.stop + n - 1, n))


class Pipeline(NamedTuple):
    """The references that fetching works on. Blocks fetched and pieces awaited are counted over the whole call."""

    paging: Paging
    scalars: TileScalars
    table: Any  # HBM [B, pages]
    pools: tuple[Any, Any]  # HBM [P, ...], keys and values
    buffers: tuple[Any, Any]  # VMEM [2, pages_per_block, ...]
    entries: Any  # SMEM [2 * pages_per_piece]
    counts: Any  # SMEM [2]: blocks, pieces
    table_semaphores: Any  # [2]
    page_semaphores: Any  # [2, 2]: buffer, keys or values

    @property
    def blocks_per_piece(self) -> int:
        return self.paging.pages_per_piece // self.paging.pages_per_block

    def _piece(self, m: Array, piece: Array, slot: Array) -> Any:
        start = pl.multiple_of(piece * self.paging.pages_per_piece, self.paging.pages_per_piece)
        row = self.table.at[self.scalars.sequence[m], pl.ds(start, self.paging.pages_per_piece)]
        place = pl.multiple_of(slot * self.paging.pages_per_piece, self.paging.pages_per_piece)
        entries = self.entries.at[pl.ds(place, self.paging.pages_per_piece)]
        return pltpu.make_async_copy(row, entries, self.table_semaphores.at[slot])

    def _next_piece(self, m: Array, piece: Array, slot: Array) -> None:
        """Starts the copy of the piece that will be wanted after this one, if there is one."""
        more = (piece + 1) * self.blocks_per_piece < block_span(self.paging, self.scalars, m).stop
        follower = self.scalars.working[m + 1]

        @pl.when(more)
        def _same_tile() -> None:
            self._piece(m, piece + 1, slot).start()

        @pl.when(jnp.logical_not(more) & (follower < self.scalars.sequence.shape[0]))
        def _next_tile() -> None:
            start = block_span(self.paging, self.scalars, follower).start
            self._piece(follower, jax.lax.div(start, jnp.int32(self.blocks_per_piece)), slot).start()

    def _visible(self, m: Array, block: Array) -> tuple[Span, Array]:
        """Places of a block's visible pages in the buffer, and whether these are all of its pages."""
        pages, n = page_span(self.paging, self.scalars, m), self.paging.pages_per_block
        start, stop = jnp.maximum(pages.start - block * n, 0), jnp.minimum(pages.stop - block * n, n)
        return Span(start, stop), stop - start == n

    def _copies(self, entry: Array, slot: Array, place: Array) -> list[Any]:
        return [
            pltpu.make_async_copy(pool.at[entry], buffer.at[slot, place], self.page_semaphores.at[slot, i])
            for i, (pool, buffer) in enumerate(zip(self.pools, self.buffers, strict=True))
        ]

    def _start_block(self, m: Array, block: Array, slot: Array) -> None:
        """Starts the copies of a block's visible pages."""
        per_piece = jnp.int32(self.blocks_per_piece)
        piece = jax.lax.div(block, per_piece)
        starts_piece = (block == piece * per_piece) | (block == block_span(self.paging, self.scalars, m).start)

        @pl.when(starts_piece)
        def _turn_to_piece() -> None:
            number = self.counts[1]
            self._piece(m, piece, number & 1).wait()
            self.counts[1] = number + 1
            self._next_piece(m, piece, (number + 1) & 1)

        places, full = self._visible(m, block)
        first = block * self.paging.pages_per_block - piece * self.paging.pages_per_piece
        first = first + ((self.counts[1] - 1) & 1) * self.paging.pages_per_piece

        def start(place: Array) -> None:
            entry = jnp.clip(self.entries[first + place], 0, self.pools[0].shape[0] - 1)  # as jax.numpy would
            for copy in self._copies(entry, slot, place):
                copy.start()

        @pl.when(full)
        def _all() -> None:
            n = min(PAGES_STARTED, self.paging.pages_per_block)

            @pl.loop(0, self.paging.pages_per_block // n)
            def _run(run: Array) -> None:
                for i in range(n):
                    start(run * n + i)

        @pl.when(jnp.logical_not(full))
        def _some() -> None:
            pl.loop(places.start, places.stop)(start)

    def _await_block(self, m: Array, block: Array, slot: Array) -> None:
        places, full = self._visible(m, block)

        @pl.when(full)
        def _all() -> None:
            for i, buffer in enumerate(self.buffers):
                whole = buffer.at[slot]
                pltpu.make_async_copy(whole, whole, self.page_semaphores.at[slot, i]).wait()

        @pl.when(jnp.logical_not(full))
        def _some() -> None:
            @pl.loop(places.start, places.stop)
            def _page(place: Array) -> None:
                for copy in self._copies(jnp.int32(0), slot, place):
                    copy.wait()

    def for_each_block(self, m: Array, compute: Callable[[Array, Array], None]) -> None:
        """Runs `compute(block, buffer)` over the blocks of tile m, in order, each when its pages have arrived."""
        blocks = block_span(self.paging, self.scalars, m)

        @pl.when(m == self.scalars.working[0])
        def _first_of_all() -> None:
            self.counts[0], self.counts[1] = jnp.int32(0), jnp.int32(0)
            self._piece(m, jax.lax.div(blocks.start, jnp.int32(self.blocks_per_piece)), jnp.int32(0)).start()
            self._start_block(m, blocks.start, jnp.int32(0))

        @pl.loop(blocks.start, jnp.where(self.scalars.last(m) >= 0, blocks.stop, blocks.start))
        def _block(block: Array) -> None:
            count = self.counts[0]
            slot = count & 1
            self.counts[0] = count + 1
            follower = self.scalars.working[m + 1]

            @pl.when(block + 1 < blocks.stop)
            def _same_tile() -> None:
                self._start_block(m, block + 1, 1 - slot)

            @pl.when((block + 1 >= blocks.stop) & (follower < self.scalars.sequence.shape[0]))
            def _next_tile() -> None:
                self._start_block(follower, block_span(self.paging, self.scalars, follower).start, 1 - slot)

            self._await_block(m, block, slot)
            compute(block, slot)
