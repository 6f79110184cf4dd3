"""What the three TPU flash kernels share: their static description, the loop over tiles of a block, and the mask.

A tile is `key_tile` keys against one query block. Tiles wholly out of sight are not computed; tiles wholly in sight
are computed without mask code; only tiles that the diagonal, the far edge of the window, the end of the keys or a
segment border crosses are masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from ..visibility import key_block_bounds, visible
from .block_bounds import Extent

LOG2_E = 1.4426950408889634
# Queries whose products are asked of the matrix unit before the arithmetic of the current unit, so that both work.
QUERIES_AHEAD = 256


class Call(NamedTuple):
    """Everything static about one kernel call."""

    extent: Extent
    groups: int  # query heads per key head
    key_tile: int
    lanes: int
    scale: float
    segmented: bool
    interpret: Any
    vmem_limit_bytes: int

    @property
    def tiles_per_block(self) -> int:
        return self.extent.key_block // self.key_tile

    @property
    def units(self) -> list[tuple[int, slice]]:
        """What is computed at once of a query block: (head of the key head, lanes), all independent of each other."""
        starts = range(0, self.extent.query_block, self.lanes)
        return [(g, slice(start, start + self.lanes)) for g in range(self.groups) for start in starts]


class Scalars(NamedTuple):
    """The prefetched scalars: `offset` [1], block ranges [batch * blocks], and id ranges where there are segments."""

    offset: Any
    start: Any
    stop: Any
    query_low: Any = None
    query_high: Any = None
    tile_low: Any = None  # [B * key tiles]
    tile_high: Any = None

    def row(self, call: Call, batch: Array, block: Array, blocks: int) -> Array:
        """Where a block's range stands in `start` and `stop`: sequences have their own only if there are segments."""
        return batch * blocks + block if call.segmented else block

    def prefetched(self) -> tuple[Array, ...]:
        """The arrays that there are, in order."""
        return tuple(x for x in self if x is not None)

    @staticmethod
    def split(call: Call, refs: tuple[Any, ...], inputs: int) -> tuple[Scalars, tuple[Any, ...], tuple[Any, ...]]:
        """A kernel's references as scalars, inputs (the two segment arrays last, if any), and all the others."""
        scalars = 7 if call.segmented else 3
        end = scalars + inputs + (2 if call.segmented else 0)
        return Scalars(*refs[:scalars]), refs[scalars:end], refs[end:]


def visited_block(scalars: Scalars, row: Array, step: Array) -> Array:
    """The block that a grid step loads. Surplus steps name the last one again, which costs no copy."""
    return jnp.maximum(jnp.minimum(scalars.start[row] + step, scalars.stop[row] - 1), 0)


def dot(a: Array, b: Array, contracting: tuple[int, int]) -> Float[Array, "m n"]:
    """Matrix product over one axis of each, summed in float32; float32 operands are multiplied at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def rows_of(call: Call, tile: Array) -> Any:
    """The keys of a tile inside its block."""
    return pl.ds(pl.multiple_of(tile * call.key_tile, call.key_tile), call.key_tile)


def for_each_tile(
    call: Call,
    scalars: Scalars,
    batch: Array,
    query_block: Array,
    key_block: Array,
    visited: Array,
    compute: Callable[[Array, bool], None],
) -> None:
    """Calls `compute(tile, masked)` for every tile of a key block that the query block sees any of.

    `visited` is false in surplus grid steps, which compute nothing.
    """
    extent = call.extent
    first, last = _query_span(call, scalars, query_block)
    low, high = key_block_bounds(first, last, extent.n_keys, call.key_tile, extent.window)
    before = key_block * call.tiles_per_block
    low = jnp.clip(low - before, 0, call.tiles_per_block)
    high = jnp.where(visited, jnp.clip(high - before, 0, call.tiles_per_block), 0)

    def one_tile(tile: Array, _: None) -> None:
        first_key = (before + tile) * call.key_tile
        last_key = first_key + call.key_tile - 1
        bare = (last_key <= first) & (last_key < extent.n_keys)
        if extent.window is not None:
            bare &= last - first_key < extent.window
        masked = ~bare
        if call.segmented:
            one_segment, may_meet = _segments_of(call, scalars, batch, query_block, before + tile)
            bare &= one_segment
            masked = may_meet & ~bare
        pl.when(bare)(lambda: compute(tile, False))
        pl.when(masked)(lambda: compute(tile, True))

    jax.lax.fori_loop(low, high, one_tile, None)


def for_each_unit(call: Call, issue: Callable[[int, slice], Any], finish: Callable[[int, slice, Any], None]) -> None:
    """Calls `finish(head, lanes, issued)` for every unit of a query block, its products issued some units before."""
    ahead = max(QUERIES_AHEAD // call.lanes, 1)
    ready = [issue(*unit) for unit in call.units[:ahead]]
    for n, unit in enumerate(call.units):
        ready += [issue(*later) for later in call.units[n + ahead : n + ahead + 1]]
        finish(*unit, ready.pop(0))


def _query_span(call: Call, scalars: Scalars, query_block: Array) -> tuple[Array, Array]:
    """Positions of the first and the last query of a block, padding left out."""
    row = query_block * call.extent.query_block
    offset = scalars.offset[0]
    return offset + row, offset + jnp.minimum(row + call.extent.query_block, call.extent.n_queries) - 1


def _segments_of(call: Call, scalars: Scalars, batch: Array, query_block: Array, tile: Array) -> tuple[Array, Array]:
    """Whether block and tile hold one and the same segment, and whether they can share any."""
    q = batch * call.extent.query_blocks + query_block
    k = batch * (call.extent.key_blocks * call.tiles_per_block) + tile
    q_low, q_high = scalars.query_low[q], scalars.query_high[q]
    k_low, k_high = scalars.tile_low[k], scalars.tile_high[k]
    one = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return one, (q_low <= k_high) & (k_low <= q_high)


def tile_mask(
    call: Call, scalars: Scalars, query_block: Array, key_block: Array, tile: Array, segments: tuple[Any, ...]
) -> Bool[Array, "keys queries"]:
    """Which keys of the tile (down) each query of the block (across) sees."""
    shape = (call.key_tile, call.extent.query_block)
    first_key = key_block * call.extent.key_block + tile * call.key_tile
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = _query_span(call, scalars, query_block)[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = visible(query, key, call.extent.window)
    if call.extent.n_keys % call.extent.key_block:
        mask &= key < call.extent.n_keys
    if segments:
        query_ref, key_ref = segments  # [1, queries], [keys of the block, 1]
        mask &= key_ref[rows_of(call, tile), :] == query_ref[...]
    return mask


def scores(call: Call, keys: Array, queries: Array, mask: Array | None) -> Float[Array, "keys queries"]:
    """Scores in base 2 (`exp2` of a difference is its softmax weight), -inf where masked."""
    product = dot(keys, queries, (1, 1)) * (call.scale * LOG2_E)
    return product if mask is None else jnp.where(mask, product, -jnp.inf)
