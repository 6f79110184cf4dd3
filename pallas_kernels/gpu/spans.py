"""Packed segments as one interval of visible columns per row, computed before a kernel runs and read inside it.

Where every segment id fills one unbroken run of positions, what a row sees under window and causality stays an
interval when segments are added. The kernels mask by intervals anyway, so packed sequences cost them nothing extra, and
blocks of foreign segments are not visited.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Int

from .extent import Extent, Steps, floor_div, key_limits, query_limits
from .tensor_core import ROWS
from .tiles import ROWS_EACH, TILE


class Spans(NamedTuple):
    """Per row the visible columns `low .. high` (none where low > high), per tile and per consumer its steps."""

    low: Int[Array, "B rows"]
    high: Int[Array, "B rows"]
    tile_steps: Int[Array, "B tile_numbers"]  # start, stop of tile 0, of tile 1, ...
    consumer_steps: Int[Array, "B consumer_numbers"]  # bare_start, bare_stop of consumer 0, of consumer 1, ...


def unbroken(segments: Int[Array, "B S"]) -> Bool[Array, ""]:
    """Whether every id occupies one run of positions in every row of the batch."""

    def changes(ids: Array) -> Array:
        return (ids[:, 1:] != ids[:, :-1]).sum(axis=1)

    return (changes(segments) == changes(jnp.sort(segments, axis=1))).all()


def _runs(ids: Int[Array, "B T"], within: Int[Array, "B S"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and last position in `within` of each id of `ids`; an id that does not occur gives (S, -1)."""

    def one(ids: Array, within: Array) -> tuple[Array, Array]:
        order = jnp.argsort(within, stable=True).astype(jnp.int32)
        ordered = within[order]
        begin, end = jnp.searchsorted(ordered, ids, side="left"), jnp.searchsorted(ordered, ids, side="right")
        found = end > begin
        first, last = order[jnp.minimum(begin, within.shape[0] - 1)], order[end - 1]
        return jnp.where(found, first, within.shape[0]), jnp.where(found, last, -1)

    first, last = jax.vmap(one)(ids, within)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def query_spans(extent: Extent, query_segments: Array, key_segments: Array, offset: Array, block: int) -> Spans:
    """What each query row sees among the keys, in key blocks of `block`. Segments are those of the real rows."""
    first, last = _runs(query_segments, key_segments)
    oldest, newest = key_limits(extent, offset + jnp.arange(extent.queries, dtype=jnp.int32))
    low = first if oldest is None else jnp.maximum(first, oldest[None])
    return _spans(jnp.maximum(low, 0), jnp.minimum(last, newest[None]), extent.keys, block, ascending=False)


def key_spans(extent: Extent, query_segments: Array, key_segments: Array, offset: Array, block: int) -> Spans:
    """Which query rows see each key, in query blocks of `block`."""
    first, last = _runs(key_segments, query_segments)
    begin, end = query_limits(extent, jnp.arange(extent.keys, dtype=jnp.int32), offset)
    high = last if end is None else jnp.minimum(last, end[None])
    return _spans(
        jnp.maximum(first, begin[None]), jnp.minimum(high, extent.queries - 1), extent.queries, block, ascending=True
    )


def _spans(low: Array, high: Array, columns: int, block: int, ascending: bool) -> Spans:
    """Rows that see nothing, padding among them, are marked so that no block is bare for them.

    Both limits are masked in the blocks that come first: below `bare_start` when blocks ascend, from `bare_stop` on
    when they descend. A range of bare blocks that is empty must therefore lie at its far end. A kernel that descends
    visits at least one block.
    """
    at_least = 0 if ascending else 1
    rows = low.shape[1]
    padding = ((0, 0), (0, -rows % TILE))
    empty = low > high
    low = jnp.pad(jnp.where(empty, columns, low), padding, constant_values=columns)
    high = jnp.pad(jnp.where(empty, -1, high), padding, constant_values=-1)

    def per(reduce: Any, limit: Array, tile: int) -> Array:
        return reduce(limit.reshape(limit.shape[0], -1, tile), axis=2)

    stop = jnp.maximum(floor_div(per(jnp.max, high, TILE) + block, block), at_least)
    start = jnp.clip(floor_div(per(jnp.min, low, TILE), block), 0, jnp.maximum(stop - at_least, 0))
    bare_start = floor_div(per(jnp.max, low, ROWS_EACH) + block - 1, block)
    bare_stop = floor_div(per(jnp.min, high, ROWS_EACH) + 1, block)
    if ascending:
        bare_stop = jnp.maximum(bare_stop, bare_start)
    else:
        bare_start = jnp.minimum(bare_start, bare_stop)
    return Spans(low, high, _interleave(start, jnp.maximum(stop, start)), _interleave(bare_start, bare_stop))


def _interleave(a: Array, b: Array) -> Array:
    return jnp.stack([a, b], axis=2).reshape(a.shape[0], -1).astype(jnp.int32)


def read_steps(spans: Any, batch: Array, tile: Array, consumer: Array) -> Steps:
    """Inside a kernel: the steps of a tile, and what is bare in them for one of its consumers."""
    start, stop = spans.tile_steps[batch, 2 * tile], spans.tile_steps[batch, 2 * tile + 1]
    mine = tile * (TILE // ROWS_EACH) + jnp.minimum(consumer, TILE // ROWS_EACH - 1)
    bare_start = jnp.clip(spans.consumer_steps[batch, 2 * mine], start, stop)
    return Steps(start, stop, bare_start, jnp.clip(spans.consumer_steps[batch, 2 * mine + 1], bare_start, stop))


def read_limits(spans: Any, batch: Array, rows: Any) -> tuple[Array, Array]:
    """Inside a kernel: the visible interval of each of a consumer's rows."""
    low = plgpu.load(spans.low.at[batch, rows], layout=ROWS, optimized=False)
    return low, plgpu.load(spans.high.at[batch, rows], layout=ROWS, optimized=False)
