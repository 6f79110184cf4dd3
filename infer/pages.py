"""Who owns which page of the cache: page tables and free lists, kept on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ministral_jax.cache import CachePlan, GroupPlan, PagedCache


class PageTables:
    """Page tables of a fixed number of sequences, one per window group, with the free pages of each group.

    A sequence asks for the positions that it is about to write; pages that its window has left go back first. With a
    cache planned for the same number of sequences and the same chunk, pages cannot run out.

    On a mesh the sequences are dealt to `shards` in equal runs, each with pools of its own. Where the plan splits a
    group over context shards, page n of a sequence lies in the pool of shard n mod C, and its table entry in that
    shard's part of the row, C parts side by side.
    """

    def __init__(self, plan: CachePlan, n_sequences: int, shards: int = 1) -> None:
        self._plan = plan
        self._per_shard = n_sequences // shards
        self._free = [
            [[list(range(group.pages - 1, 0, -1)) for _ in range(group.context)] for group in plan.groups]
            for _ in range(shards)
        ]
        self.tables = tuple(
            np.zeros((n_sequences, group.context * -(-plan.table_width // group.context)), np.int32)
            for group in plan.groups
        )

    def advance(self, sequence: int, start: int, stop: int) -> None:
        """Makes positions `start .. stop - 1` writable and gives back what no query from `start` on can see."""
        page = self._plan.page_size
        if stop > self._plan.length:
            raise ValueError(f"position {stop - 1} is past the cache's length {self._plan.length}")
        for group, table, free in self._of(sequence):
            if group.window is not None:
                self._give_back(table[:, : max(start - group.window + 1, 0) // page], free)
            for n in range(start // page, -(-stop // page)):
                place = (n % group.context, n // group.context)
                if table[place] == 0:
                    table[place] = free[place[0]].pop()

    def release(self, sequence: int) -> None:
        """Gives back every page of a sequence that has ended."""
        for _, table, free in self._of(sequence):
            self._give_back(table, free)

    def pages_held(self, group: int) -> int:
        """Pages of a group that sequences own now."""
        return int(np.count_nonzero(self.tables[group]))

    def _of(self, sequence: int) -> Iterator[tuple[GroupPlan, np.ndarray, list[list[int]]]]:
        """Each group's plan, the sequence's table [C, width], and the free pages of its shard, a list per context
        shard."""
        free = self._free[sequence // self._per_shard]
        for group, table, pages in zip(self._plan.groups, self.tables, free, strict=True):
            yield group, table[sequence].reshape(group.context, -1), pages

    @staticmethod
    def _give_back(rows: np.ndarray, free: list[list[int]]) -> None:
        for row, pages in zip(rows, free, strict=True):
            pages.extend(int(page) for page in row[row > 0])
            row[:] = 0


def bytes_per_page(cache: PagedCache, group: int) -> int:
    """Bytes that one page number of a group stands for: keys and values of all the group's layers."""
    layers = [i for i, g in enumerate(cache.group_of_layer) if g == group]
    pools = [pool for i in layers for pool in (cache.keys[i], cache.values[i]) if pool is not None]
    return sum(pool.nbytes // pool.shape[0] for pool in pools)
