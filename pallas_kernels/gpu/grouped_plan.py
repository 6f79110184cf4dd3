"""How a grouped product is cut on Hopper: tile sizes from shapes, and which tiles the groups need.

Sizes are static. The groups are known only when the program runs, so which expert and which rows a tile has is computed
on the device; the number of tiles has a static bound, and tiles past the used ones are not visited.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .tiles import LINE, ROWS_EACH, SHARED_MEMORY_LIMIT

DEPTH_BYTES = 128  # of one step of a sum: a swizzled row
WIDTHS = (256, 128, 64)  # of a tile, in columns of the result
CHUNK = 64  # columns that are stored at a time
MOST_SLOTS = 2  # chunks of a consumer on their way to device memory
# Up to so many rows of an expert in the mean, tiles have the rows of one consumer: there the matrices are what is read.
FEW_ROWS = 64
# A narrower tile is taken where the widest leave so much of the last wave idle.
FULL_ENOUGH = 0.85


@dataclasses.dataclass(frozen=True)
class GroupedPlan:
    """Rows and columns of a tile of the result, steps in flight, and programs that take turns with the tiles."""

    rows: int
    columns: int
    stages: int
    programs: int

    @property
    def consumers(self) -> int:
        return self.rows // ROWS_EACH

    @property
    def slots(self) -> int:
        """Chunks of a consumer on their way to device memory: consecutive chunks of a tile take turns with them."""
        return min(MOST_SLOTS, self.columns // CHUNK)

    @property
    def bytes_needed(self) -> int:
        """Shared memory: loaded steps, chunks to be stored, and a line for the barriers."""
        step = DEPTH_BYTES * (self.rows + self.columns)
        return self.stages * step + 2 * self.rows * self.slots * CHUNK + LINE

    def with_most_stages(self) -> GroupedPlan:
        """The same with as many steps in flight as shared memory holds."""
        none = dataclasses.replace(self, stages=0).bytes_needed
        step = dataclasses.replace(self, stages=1).bytes_needed - none
        return dataclasses.replace(self, stages=(SHARED_MEMORY_LIMIT - none) // step)


def plan_product(n_rows: int, n_experts: int, n_out: int, programs: int, widest: int = WIDTHS[0]) -> GroupedPlan:
    """For `n_rows` of all groups together, by matrices with `n_out` columns of the result, a multiple of 64."""
    few = n_rows <= FEW_ROWS * n_experts
    consumers = 1 if few else 2
    rows = consumers * ROWS_EACH
    # With few rows every expert that is hit has one tile of rows, or two.
    row_tiles = min(n_rows, n_experts) if few else -(-n_rows // rows)
    return GroupedPlan(rows, _columns(row_tiles, n_out, programs, widest), 1, programs).with_most_stages()


def plan_gradient(n_out: int, n_in: int, programs: int) -> GroupedPlan:
    """For gradients of matrices [O, I], both multiples of 64: there a tile's rows are outputs, its columns inputs."""
    columns = next(width for width in WIDTHS if n_in % width == 0)
    # Each of two consumers takes half of the columns, no fewer than a swizzled row has.
    rows = 2 * ROWS_EACH if n_out % (2 * ROWS_EACH) == 0 and columns > CHUNK else ROWS_EACH
    return GroupedPlan(rows, columns, 1, programs).with_most_stages()


def _columns(row_tiles: int, n_out: int, programs: int, widest: int) -> int:
    """The widest tile that keeps the programs busy enough, else the one that keeps them busiest."""
    widths = [width for width in WIDTHS if n_out % width == 0 and width <= widest]

    def busy(width: int) -> float:
        tiles = row_tiles * (n_out // width)
        return tiles / (-(-tiles // programs) * programs)

    return next((width for width in widths if busy(width) >= FULL_ENOUGH), max(widths, key=busy))


class Visits(NamedTuple):
    """Tiles of rows: tile i holds rows `start[i] .. stop[i] - 1`, all of expert `expert[i]`, for i < used[0].

    A tile begins where its group begins or where the tile before it in the group ends, so groups of s rows have exactly
    `ceil(s / rows)` tiles, and no tile holds rows of two groups.
    """

    expert: Int[Array, "tiles"]
    start: Int[Array, "tiles"]
    stop: Int[Array, "tiles"]
    used: Int[Array, "1"]


def most_visits(n_rows: int, n_experts: int, rows: int) -> int:
    """How many tiles of rows any groups can need."""
    groups = min(n_rows, n_experts)
    return (n_rows + groups * (rows - 1)) // rows


def visits(group_sizes: Int[Array, "E"], n_rows: int, rows: int) -> Visits:
    """The tiles that these groups need, out of `most_visits`."""
    sizes = group_sizes.astype(jnp.int32)
    tiles, ends = -(-sizes // rows), jnp.cumsum(sizes)
    last = jnp.cumsum(tiles)
    index = jnp.arange(most_visits(n_rows, len(sizes), rows), dtype=jnp.int32)
    expert = jnp.searchsorted(last, index, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, len(sizes) - 1)
    start = (ends - sizes)[expert] + (index - (last - tiles)[expert]) * rows
    return Visits(expert, start, jnp.minimum(start + rows, ends[expert]), last[-1:])


def n_programs() -> int:
    """Multiprocessors of the device compiled for: that of the abstract mesh in use (an absent chip), else jax's."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract is not None else jax.devices()[0].core_count
