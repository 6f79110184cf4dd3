"""How the TPU paged-attention kernel reads its queries and writes its results: rows [T, ...] in HBM, a tile at a time.

The queries of the next tile come while this one is computed, the results of the last one leave meanwhile. A tile's rows
are copied in powers of two, so that no row of another tile is ever touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from .paged_tiles import TileScalars


class Queries(NamedTuple):
    """The references that the copies work on."""

    scalars: TileScalars
    q: Any  # HBM [T, N, H]
    out: Any  # HBM [T, N, Hv]
    lse: Any  # HBM [T, 1, N]
    q_buffers: Any  # VMEM [2, tile, N, H]
    out_buffer: Any  # VMEM [tile, N, Hv]
    lse_buffer: Any  # VMEM [tile, 1, N]
    q_semaphores: Any  # [2]
    result_semaphores: Any  # [2]

    def await_queries(self, m: Array) -> Array:
        """Starts to fetch the next tile's queries; returns in which buffer those of this one have arrived."""
        slot = m & 1

        @pl.when(m == 0)
        def _first_of_all() -> None:
            self._for_each_run(m, lambda at, n: self._fetch(m, slot, at, n).start())

        @pl.when(m + 1 < self.scalars.used[0])
        def _next_tile() -> None:
            self._for_each_run(m + 1, lambda at, n: self._fetch(m + 1, 1 - slot, at, n).start())

        self._for_each_run(m, lambda at, n: self._fetch(m, slot, at, n).wait())
        return slot

    def await_buffers(self, m: Array) -> None:
        """Until the results of the tile before have left."""

        @pl.when(m > 0)
        def _tile_before() -> None:
            self._for_each_run(m - 1, lambda at, n: self._store(m - 1, at, n, start=False))

    def store(self, m: Array) -> None:
        """Starts to write the results; those of the last tile are waited for."""
        self._for_each_run(m, lambda at, n: self._store(m, at, n, start=True))

        @pl.when(m + 1 == self.scalars.used[0])
        def _last_of_all() -> None:
            self._for_each_run(m, lambda at, n: self._store(m, at, n, start=False))

    def _for_each_run(self, m: Array, do: Callable[[Array, int], None]) -> None:
        """Runs `do(first row, rows)` over runs that make up the rows of a tile; their lengths are powers of two."""
        count, n = self.scalars.count[m], self.out_buffer.shape[0]
        while n > self.out.shape[0]:  # no such run exists, and no such slice can be written down
            n //= 2
        while n:

            @pl.when((count & n) != 0)
            def _run(n: int = n) -> None:
                do(count & ~jnp.int32(2 * n - 1), n)

            n //= 2

    def _fetch(self, m: Array, slot: Array, at: Array, n: int) -> Any:
        rows = self.q.at[pl.ds(self.scalars.row[m] + at, n)]
        return pltpu.make_async_copy(rows, self.q_buffers.at[slot, pl.ds(at, n)], self.q_semaphores.at[slot])

    def _store(self, m: Array, at: Array, n: int, start: bool) -> None:
        for i, (buffer, result) in enumerate(((self.out_buffer, self.out), (self.lse_buffer, self.lse))):
            rows = result.at[pl.ds(self.scalars.row[m] + at, n)]
            copy = pltpu.make_async_copy(buffer.at[pl.ds(at, n)], rows, self.result_semaphores.at[i])
            if start:
                copy.start()
            else:
                copy.wait()
