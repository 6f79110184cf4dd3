"""Which blocks a tile visits and which of those need no mask: int32 arithmetic, inside kernels and out."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Extent:
    """The static facts that decide visibility. The query in row t stands at `offset + t`, the key in row s at s.

    Attributes:
      window: keys a query sees, itself included; None for all before it.
      queries, keys: how many rows are real; arrays may be padded to whole blocks beyond that.
    """

    window: int | None
    queries: int
    keys: int


class Steps(NamedTuple):
    """Blocks `start .. stop - 1` hold all that a tile sees; `bare_start .. bare_stop - 1` of them need no mask."""

    start: Array
    stop: Array
    bare_start: Array
    bare_stop: Array


def floor_div(a: Array, b: int) -> Array:
    """`a // b` for a >= 0, without the sign handling of `//`."""
    return lax.div(a, jnp.asarray(b, a.dtype))


def ceil_div(a: Array, b: int) -> Array:
    """`-(-a // b)` for a >= 0."""
    return floor_div(a + (b - 1), b)


def key_limits(extent: Extent, position: Array) -> tuple[Array | None, Array]:
    """The oldest and the newest key that a query at `position` sees; the oldest is None where there is no window."""
    newest = jnp.minimum(position, extent.keys - 1)
    return None if extent.window is None else position - (extent.window - 1), newest


def query_limits(extent: Extent, key: Array, offset: Array) -> tuple[Array, Array | None]:
    """The first and the last query row that see `key`; the last is None where there is no window."""
    row = key - offset
    return row, None if extent.window is None else row + (extent.window - 1)


def key_steps(extent: Extent, first: Array, last: Array, block: int) -> Steps:
    """The key blocks of the queries that stand at `first .. last`.

    Where nothing is seen the range still has one block, all of it masked: the kernels then need no empty case.
    """
    oldest, newest = key_limits(extent, first)
    last_oldest, last_newest = key_limits(extent, last)
    stop = jnp.maximum(ceil_div(jnp.maximum(last_newest + 1, 0), block), 1)
    start = bare_start = jnp.zeros_like(stop)
    if oldest is not None and last_oldest is not None:
        start = jnp.minimum(floor_div(jnp.maximum(oldest, 0), block), stop - 1)
        bare_start = ceil_div(jnp.maximum(last_oldest, 0), block)
    bare_stop = jnp.clip(floor_div(jnp.maximum(newest + 1, 0), block), start, stop)
    return Steps(start, stop, jnp.clip(bare_start, start, bare_stop), bare_stop)


def query_steps(extent: Extent, first: Array, last: Array, offset: Array, block: int) -> Steps:
    """The query blocks that see any of the keys `first .. last`; none where `stop <= start`.

    Rows past `extent.queries` in the last block need no mask: they carry no weight.
    """
    begin, end = query_limits(extent, first, offset)
    last_begin, last_end = query_limits(extent, last, offset)
    rows = extent.queries
    start = floor_div(jnp.clip(begin, 0, rows), block)
    stop = bare_stop = jnp.full_like(start, -(-rows // block))
    if end is not None and last_end is not None:
        stop = ceil_div(jnp.clip(last_end + 1, 0, rows), block)
        bare_stop = floor_div(jnp.maximum(end + 1, 0), block)
    stop = jnp.maximum(start, stop)
    bare_start = jnp.clip(ceil_div(jnp.maximum(last_begin, 0), block), start, stop)
    return Steps(start, stop, bare_start, jnp.clip(bare_stop, bare_start, stop))
