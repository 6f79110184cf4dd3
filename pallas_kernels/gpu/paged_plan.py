"""How paged_attention is cut up on Hopper: tiles of queries, blocks of keys, splits. Numbers, no kernels.

Everything here is decided from shapes before a program is compiled; lengths are known only when it runs.
"""

from __future__ import annotations

import dataclasses

from .tiles import LINE, ROWS_EACH, SHARED_MEMORY_LIMIT

MULTIPROCESSORS = 132  # of an H100 SXM or H200
FULL_ENOUGH = 0.8  # tiles per multiprocessor from which on keys are not split
EFFICIENT = 0.85  # of the best share of busy multiprocessors, where keys are split
PROMPT_STAGES = 2
DECODING_STAGES = 6  # at most: decoding waits for memory, and keeps as much on its way as fits


@dataclasses.dataclass(frozen=True)
class PagedPlan:
    """Static facts of one call.

    Attributes:
      window: keys a query sees, itself included; None for all before it.
      group: query heads per key head.
      consumers: warpgroups that multiply, 64 rows each.
      rings: 1 where all consumers multiply the same blocks; else one per consumer, each with keys of its own.
      tokens: query tokens of a tile.
      rows: `tokens * group`, up to whole eights: the rows of a tile in memory.
      block, stages: keys of one loaded block, and how many blocks of a ring are in flight.
      splits: parts that the keys of a tile are cut into, a multiple of `rings`.
    """

    window: int | None
    group: int
    consumers: int
    rings: int
    tokens: int
    rows: int
    block: int
    stages: int
    splits: int

    def bytes_needed(self, width: int, value_width: int, pool_bytes: int) -> int:
        """Shared memory of one tile: queries or outputs, the rings, widened blocks, row values and barriers."""
        out_bytes = 2 if self.splits == 1 else 4
        resident = self.consumers * ROWS_EACH * max(2 * width, out_bytes * value_width)
        both = self.rings * self.block * (width + value_width)
        widened = 2 * both if pool_bytes == 1 else 0
        return resident + self.stages * both * pool_bytes + widened + 2 * LINE


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes that a plan follows from."""

    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    positions: int  # that a page table has room for
    pool_bytes: int


def plan_for(sizes: Sizes, window: int | None) -> PagedPlan:
    """The plan of a call. Over 8-bit pools every consumer widens blocks for itself, and so has keys of its own."""
    group, narrow = sizes.heads // sizes.kv_heads, sizes.pool_bytes == 1
    share = max(sizes.tokens // max(sizes.sequences, 1), 1)  # tokens of a sequence, if all have the same
    prompt = not narrow and share * group > ROWS_EACH
    rings = 2 if narrow else 1
    most = (2 if prompt else 1) * ROWS_EACH // group
    tokens = min(1 << (share - 1).bit_length(), most)
    rows = 2 * ROWS_EACH if prompt else -(-tokens * group // 8) * 8
    block = 128 if prompt and sizes.width + sizes.value_width <= 256 else 64
    reach = sizes.positions if window is None else min(sizes.positions, window + tokens + block)
    tiles = tile_count(sizes.tokens, sizes.sequences, tokens) * sizes.kv_heads
    splits = rings * split_count(tiles, -(-reach // (rings * block)))
    plan = PagedPlan(window, group, 2 if prompt else rings, rings, tokens, rows, block, PROMPT_STAGES, splits)
    stages = [PROMPT_STAGES] if prompt else range(DECODING_STAGES, 0, -1)
    plans = [dataclasses.replace(plan, stages=n, splits=m) for m in (splits, rings) for n in stages]
    return next(
        plan
        for plan in plans
        if plan.bytes_needed(sizes.width, sizes.value_width, sizes.pool_bytes) <= SHARED_MEMORY_LIMIT
        and (plan.stages > 1 or plan.splits == rings)
    )


def tile_count(tokens: int, sequences: int, tile: int) -> int:
    """The most tiles of `tile` tokens that any split of `tokens` rows over the sequences can need."""
    return tokens if tile == 1 else tokens // tile + min(sequences, tokens)


def split_count(tiles: int, blocks: int) -> int:
    """Parts to cut the keys into: one where the tiles fill the chip, else the fewest that fill it well enough."""
    if tiles >= FULL_ENOUGH * MULTIPROCESSORS:
        return 1
    filled = {splits: _filled(tiles * splits) for splits in range(1, max(min(blocks, MULTIPROCESSORS), 1) + 1)}
    return next(splits for splits, share in filled.items() if share >= EFFICIENT * max(filled.values()))


def _filled(work: int) -> float:
    """The share of multiprocessors at work, over all waves of equal pieces."""
    return work / (-(-work // MULTIPROCESSORS) * MULTIPROCESSORS)
