"""Which blocks the TPU kernels visit: bounds from positions, window and segments, and the number of grid steps.

All of it is arithmetic on positions: no mask is built. The arrays made here are prefetched into scalar memory; the
kernels and their index maps read nothing else to decide what to load.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..visibility import key_block_bounds


class Extent(NamedTuple):
    """Lengths and blocks of one call. `offset` is None where it is only known when the program runs."""

    n_queries: int
    n_keys: int
    window: int | None
    offset: int | None
    query_block: int
    key_block: int

    @property
    def query_blocks(self) -> int:
        return -(-self.n_queries // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.n_keys // self.key_block)


class BlockRanges(NamedTuple):
    """Half-open ranges of blocks, one per (batch, block of the other side), flat: `[batch * blocks]`. Empty: start 0.

    `batch` is 1 where all sequences share the ranges (no segments).
    """

    start: Int[Array, "n"]
    stop: Int[Array, "n"]


class SegmentRanges(NamedTuple):
    """Smallest and largest segment id of each block of positions, flat `[B * blocks]`."""

    low: Int[Array, "n"]
    high: Int[Array, "n"]


def _first_and_last(extent: Extent, offset: Array | int) -> tuple[Array, Array]:
    first = np.arange(extent.query_blocks, dtype=np.int32) * extent.query_block
    last = np.minimum(first + extent.query_block, extent.n_queries) - 1
    return offset + jnp.asarray(first), offset + jnp.asarray(last)


def query_block_bounds(
    first_key: Array | int, last_key: Array | int, offset: Array | int, n_queries: int, block: int, window: int | None
) -> tuple[Array, Array]:
    """Half-open range of query blocks that hold any query which sees a key at positions `first_key .. last_key`.

    The mirror image of `key_block_bounds`: query i stands at `offset + i`, and blocks hold `block` of them.
    """
    first = jnp.maximum(jnp.asarray(first_key, jnp.int32) - offset, 0)
    end = n_queries if window is None else jnp.minimum(last_key + window - offset, n_queries)
    end = jnp.where(first < end, end, 0)
    return first // block, -(-end // block)


def key_ranges(extent: Extent, offset: Array | int, overlap: Bool[Array, "B q k"] | None) -> BlockRanges:
    """For each query block, the range of key blocks it visits."""
    start, stop = key_block_bounds(*_first_and_last(extent, offset), extent.n_keys, extent.key_block, extent.window)
    return _flat_ranges(start, stop, extent.key_blocks, overlap)


def query_ranges(extent: Extent, offset: Array | int, overlap: Bool[Array, "B q k"] | None) -> BlockRanges:
    """For each key block, the range of query blocks that visit it."""
    first = jnp.arange(extent.key_blocks, dtype=jnp.int32) * extent.key_block
    last = jnp.minimum(first + extent.key_block, extent.n_keys) - 1
    start, stop = query_block_bounds(first, last, offset, extent.n_queries, extent.query_block, extent.window)
    return _flat_ranges(start, stop, extent.query_blocks, None if overlap is None else overlap.swapaxes(1, 2))


def _flat_ranges(start: Array, stop: Array, blocks: int, overlap: Array | None) -> BlockRanges:
    start, stop = start[None], stop[None]  # [1, rows]
    if overlap is not None:
        at = jnp.arange(blocks, dtype=jnp.int32)
        inside = overlap & (at >= start[..., None]) & (at < stop[..., None])  # [B, rows, blocks]
        start = jnp.argmax(inside, axis=-1)
        stop = jnp.where(inside.any(axis=-1), blocks - jnp.argmax(inside[..., ::-1], axis=-1), 0)
    empty = stop <= start
    start, stop = jnp.where(empty, 0, start), jnp.where(empty, 0, stop)
    return BlockRanges(start.astype(jnp.int32).reshape(-1), stop.astype(jnp.int32).reshape(-1))


def segment_ranges(segments: Int[Array, "B T"], block: int) -> SegmentRanges:
    """Smallest and largest id of each block. `segments` is padded to a multiple of `block` (with an edge id)."""
    blocked = segments.reshape(segments.shape[0], -1, block)
    return SegmentRanges(blocked.min(axis=-1).reshape(-1), blocked.max(axis=-1).reshape(-1))


def segment_overlap(queries: SegmentRanges, keys: SegmentRanges, batch: int) -> Bool[Array, "B q k"]:
    """True where the id ranges of a query block and a key block meet; elsewhere no pair of them can be equal."""
    q_low, q_high, k_low, k_high = (x.reshape(batch, -1) for x in (*queries, *keys))
    return (q_low[:, :, None] <= k_high[:, None, :]) & (k_low[:, None, :] <= q_high[:, :, None])


def _most_touched(run: int, block: int, blocks: int) -> int:
    """Blocks that a run of neighbouring positions touches at most, wherever it starts."""
    return min(blocks, (run + block - 2) // block + 1)


def key_steps(extent: Extent) -> int:
    """Grid steps over key blocks per query block: the most that any query block visits, at least 1."""
    if extent.offset is not None:
        first = extent.offset + np.arange(extent.query_blocks) * extent.query_block
        last = np.minimum(first + extent.query_block, extent.offset + extent.n_queries) - 1
        oldest = np.zeros_like(first) if extent.window is None else np.maximum(first - extent.window + 1, 0)
        return _longest(oldest, np.minimum(last + 1, extent.n_keys), extent.key_block)
    if extent.window is None:
        return extent.key_blocks
    return _most_touched(extent.query_block + extent.window - 1, extent.key_block, extent.key_blocks)


def query_steps(extent: Extent) -> int:
    """Grid steps over query blocks per key block: the most that any key block is visited by, at least 1."""
    if extent.offset is not None:
        first = np.arange(extent.key_blocks) * extent.key_block
        last = np.minimum(first + extent.key_block, extent.n_keys) - 1
        end = np.full_like(first, extent.n_queries) if extent.window is None else last + extent.window - extent.offset
        return _longest(np.maximum(first - extent.offset, 0), np.minimum(end, extent.n_queries), extent.query_block)
    if extent.window is None:
        return extent.query_blocks
    return _most_touched(extent.key_block + extent.window - 1, extent.query_block, extent.query_blocks)


def _longest(first: np.ndarray, end: np.ndarray, block: int) -> int:
    """The most blocks that any of the position ranges `first .. end - 1` touches, at least 1."""
    return max(1, int(np.where(first < end, -(-end // block) - first // block, 0).max()))


def visible_pairs(extent: Extent) -> int:
    """Pairs of query and key that see each other, segments left out. An unknown offset is taken as S - T."""
    offset = extent.n_keys - extent.n_queries if extent.offset is None else extent.offset
    position = offset + np.arange(extent.n_queries, dtype=np.int64)
    oldest = 0 if extent.window is None else np.maximum(position - extent.window + 1, 0)
    return int(np.maximum(np.minimum(position + 1, extent.n_keys) - oldest, 0).sum())
