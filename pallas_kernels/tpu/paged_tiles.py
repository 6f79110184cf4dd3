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
    first: Any  # [M] position of the first row, negative where a sequence has more queries than tokens
    last: Any  # [M] position of the last row; negative where the tile sees nothing
    working: Any  # [M + 1]
    used: Any  # [1] number of tiles that hold rows


class Tiles(NamedTuple):
    """The rows of each tile, and its scalars."""

    rows: Int[Array, "M tile"]  # index of the packed query row, or T for none
    scalars: TileScalars


def tile_count(n_tokens: int, n_sequences: int, tile: int) -> int:
    """The most tiles that any split of the rows over the sequences can need."""
    return n_tokens if tile == 1 else n_tokens // tile + min(n_sequences, n_tokens)


def paged_tiles(
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    n_tokens: int,
    tile: int,
    most: int,
    chosen: Bool[Array, "B"],
) -> Tiles:
    """Cuts the query rows of the `chosen` sequences into at most `most` tiles of `tile` rows."""
    counts = jnp.where(chosen, query_starts[1:] - query_starts[:-1], 0)  # [B]
    ends = jnp.cumsum(-(-counts // tile), dtype=jnp.int32)  # tiles up to and including each sequence
    index = jnp.arange(most, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), counts.shape[0] - 1)  # [M]
    used = index < ends[-1]
    start = (index - (ends - -(-counts // tile))[sequence]) * tile  # [M] first row within the sequence
    held = jnp.where(used, jnp.clip(counts[sequence] - start, 0, tile), 0)  # [M] rows of the tile
    place = jnp.arange(tile, dtype=jnp.int32)
    rows = jnp.where(place < held[:, None], (query_starts[:-1][sequence] + start)[:, None] + place, n_tokens)
    first = (lengths - counts)[sequence] + start
    last = jnp.where(used, first + held - 1, -1)
    working = jnp.append(jnp.where(last >= 0, index, most), jnp.int32(most))
    return Tiles(rows, TileScalars(sequence, first, last, jax.lax.cummin(working, reverse=True), ends[-1:]))


def loaded_tile(m: Array, scalars: TileScalars) -> Array:
    """The tile whose queries a grid step loads: steps past the last used tile name it again, which copies nothing."""
    return jnp.maximum(jnp.minimum(m, scalars.used[0] - 1), 0)
