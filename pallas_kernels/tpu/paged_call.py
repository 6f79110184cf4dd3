"""What the two forms of the TPU paged-attention kernel share: static description, and what a tile sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from .paged_fetch import Paging


class PagedCall(NamedTuple):
    """Everything static about one kernel call.

    Few queries are computed by rows (paged_rows.py), many by lanes (paged_lanes.py). By rows, a unit is what one matrix
    product sees: the rows of one key head, or, where `units` is 1, of all of them. Pools that are `head_major` are
    [P, K, page, H] in memory, others [P, page, K, H].
    """

    paging: Paging
    kv_heads: int
    groups: int  # query heads per key head
    tile: int  # tokens
    by_rows: bool
    units: int
    head_major: bool
    chunk: int  # tokens read at once
    lanes: int  # queries of one head computed at once, by lanes
    interpret: Any
    vmem_limit_bytes: int

    @property
    def heads_per_unit(self) -> int:
        """Key heads whose entries a unit multiplies together."""
        return self.kv_heads // self.units

    @property
    def rows(self) -> int:
        """Query rows of a unit."""
        return self.tile * self.groups * self.heads_per_unit


class Seen(NamedTuple):
    """Positions of the first and last row of a tile, and of the oldest key that one of its rows sees."""

    first: Array
    last: Array
    oldest: Array

    def bare(self, begin: Array, n: int, window: int | None) -> Bool[Array, ""]:
        """Whether every row sees all `n` keys from `begin` on."""
        far = True if window is None else begin > self.last - window
        return (begin + n - 1 <= self.first) & far


def zeroed_outside(
    values: Num[Array, "*shape"], at: Int[Array, "*shape"], first: Array, last: Array
) -> Num[Array, "*shape"]:
    """`values` with zero in place of those that do not stand at `first .. last`."""
    return jnp.where((at >= first) & (at <= last), values, jnp.zeros_like(values))
