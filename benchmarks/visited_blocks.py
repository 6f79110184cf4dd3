"""Draws which blocks flash_attention visits, and which of them carry mask code, as text. It computes no attention.

    python benchmarks/visited_blocks.py --tokens 96 --window 24 --query-block 16 --key-block 16 --key-tile 8

Rows are query blocks, columns are tiles of keys: `#` computed without a mask, `/` computed with one, `.` not computed;
`|` parts the key blocks that one grid step loads. The bounds are those of the TPU kernels.
"""

from __future__ import annotations

import argparse

import numpy as np

from pallas_kernels.tpu.block_bounds import Extent, key_ranges, key_steps
from pallas_kernels.visibility import visible


def drawing(extent: Extent, key_tile: int) -> str:
    """One line per query block, then the counts."""
    start, stop = (np.asarray(x) for x in key_ranges(extent, extent.offset or 0, None))
    positions = (extent.offset or 0) + np.arange(extent.n_queries)
    lines, computed, masked = [], 0, 0
    for i in range(extent.query_blocks):
        rows = positions[i * extent.query_block : (i + 1) * extent.query_block]
        columns = []
        for first in range(0, extent.n_keys, key_tile):
            seen = np.asarray(visible(rows[:, None], np.arange(first, first + key_tile)[None], extent.window))
            loaded = start[i] <= first // extent.key_block < stop[i]
            assert loaded or not seen.any(), "a visible tile lies outside the range"
            mark = "#" if seen.all() else "/" if seen.any() else "."
            columns.append(("|" if first % extent.key_block == 0 else "") + mark)
            computed, masked = computed + (mark != "."), masked + (mark == "/")
        lines.append("".join(columns) + f"|  {stop[i] - start[i]} blocks of keys")
    tiles = extent.query_blocks * -(-extent.n_keys // key_tile)
    lines.append(f"{computed} of {tiles} tiles computed, {masked} of them masked; {key_steps(extent)} steps per row")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--window", type=int, default=None)
    parser.add_argument("--query-block", type=int, default=16)
    parser.add_argument("--key-block", type=int, default=16)
    parser.add_argument("--key-tile", type=int, default=8)
    arguments = parser.parse_args()
    tokens, window = arguments.tokens, arguments.window
    extent = Extent(tokens, tokens, window, 0, arguments.query_block, arguments.key_block)
    print(drawing(extent, arguments.key_tile))


if __name__ == "__main__":
    main()
