"""Who owns which page of the cache: page tables and free lists, kept on the host."""

from __future__ import annotations

import numpy as np

from ministral_jax.cache import CachePlan, PagedCache


class PageTables:
    """Page tables of a fixed number of sequences, one per window group, with the free pages of each group.

    A sequence asks for the positions that it is about to write; pages that its window has left go back first. With a
    cache planned for the same number of sequences and the same chunk, pages cannot run out.
    """

    def __init__(self, plan: CachePlan, n_sequences: int) -> None:
        self._plan = plan
        self._free = [list(range(group.pages - 1, 0, -1)) for group in plan.groups]
        self.tables = tuple(np.zeros((n_sequences, plan.table_width), np.int32) for _ in plan.groups)

    def advance(self, sequence: int, start: int, stop: int) -> None:
        """Makes positions `start .. stop - 1` writable and gives back what no query from `start` on can see."""
        page = self._plan.page_size
        if stop > self._plan.length:
            raise ValueError(f"position {stop - 1} is past the cache's length {self._plan.length}")
        for group, table, free in zip(self._plan.groups, self.tables, self._free, strict=True):
            row = table[sequence]
            if group.window is not None:
                self._give_back(row[: max(start - group.window + 1, 0) // page], free)
            wanted = row[start // page : -(-stop // page)]
            for i in np.flatnonzero(wanted == 0):
                wanted[i] = free.pop()

    def release(self, sequence: int) -> None:
        """Gives back every page of a sequence that has ended."""
        for table, free in zip(self.tables, self._free, strict=True):
            self._give_back(table[sequence], free)

    def pages_held(self, group: int) -> int:
        """Pages of a group that sequences own now."""
        return int(np.count_nonzero(self.tables[group]))

    @staticmethod
    def _give_back(row: np.ndarray, free: list[int]) -> None:
        free.extend(int(page) for page in row[row > 0])
        row[:] = 0


def bytes_per_page(cache: PagedCache, group: int) -> int:
    """Bytes that one page number of a group stands for: keys and values of all the group's layers."""
    layers = [i for i, g in enumerate(cache.group_of_layer) if g == group]
    pools = [pool for i in layers for pool in (cache.keys[i], cache.values[i]) if pool is not None]
    return sum(pool.nbytes // pool.shape[0] for pool in pools)
