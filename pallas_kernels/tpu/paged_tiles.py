"""How the packed queries of paged attention on TPU are cut into tiles, and the scalars that the kernel reads of them.

A tile is a run of query rows of one sequence: what the kernel holds while it walks over the keys that they see.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class TileScalars(NamedTuple):
    """Prefetched scalars of the tiles. Tiles without rows stand at the end; tiles that see nothing may stand anywhere.

    `working` names, for each place, the first tile from there on that sees any key (M for none): the kernel fetches the
    first pages of the next such tile while it finishes the one before.
    """

    sequence: Any  # [M]
    row: Any  # [M] first packed query row
    count: Any  # [M] rows
    first: Any  # [M] position of the first row, negative where a sequence has more queries than tokens
    working: Any  # [M + 1]
    used: Any  # [1] number of tiles that hold rows

    def last(self, m: Array) -> Array:
        """Position of the last row, negative where the tile sees nothing."""
        return self.first[m] + self.count[m] - 1


def tile_count(n_tokens: int, n_sequences: int, tile: int) -> int:
    """The most tiles that any split of the rows over the sequences can need."""
    return n_tokens if tile == 1 else n_tokens // tile + min(n_sequences, n_tokens)


def paged_tiles(
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    tile: int,
    most: int,
    chosen: Bool[Array, "B"],
) -> TileScalars:
    """Cuts the query rows of the `chosen` sequences into at most `most` tiles of up to `tile` rows."""
    counts = jnp.where(chosen, query_starts[1:] - query_starts[:-1], 0)  # [B]
    tiles = -(-counts // tile)
    ends = jnp.cumsum(tiles, dtype=jnp.int32)  # tiles up to and including each sequence
    index = jnp.arange(most, dtype=jnp.int32)
    sequence = jnp.minimum(
        jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32), counts.shape[0] - 1
    )  # [M]
    start = (index - (ends - tiles)[sequence]) * tile  # [M] first row within the sequence
    count = jnp.where(index < ends[-1], jnp.clip(counts[sequence] - start, 0, tile), 0)
    first = (lengths - counts)[sequence] + start
    sees = (count > 0) & (first + count > 0)
    working = jnp.append(jnp.where(sees, index, most), jnp.int32(most))
    row = query_starts[:-1][sequence] + start
    return TileScalars(sequence, row, count, first, jax.lax.cummin(working, reverse=True), ends[-1:])
