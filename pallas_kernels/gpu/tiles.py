"""Tile sizes of the Hopper kernels by head width, and the shared memory that they take. Numbers, no kernels."""

from __future__ import annotations

import dataclasses

CONSUMERS = 2  # warpgroups that multiply; a third one loads
ROWS_EACH = 64  # rows of a wgmma, and of a consumer
TILE = CONSUMERS * ROWS_EACH
SHARED_MEMORY_LIMIT = 232_448  # bytes that one block of threads may use on sm_90
LINE = 1024  # swizzled buffers start on multiples of this


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows per pipelined block and how many blocks are in flight, for each of the three kernels."""

    forward_block: int
    forward_stages: int
    query_block: int  # key rows per step of the dQ kernel
    query_stages: int
    key_block: int  # query rows per step of the dK, dV kernel
    key_stages: int

    def forward_bytes(self, width: int, value_width: int) -> int:
        """Shared memory of the forward kernel: queries (outputs lie over them), keys, values, log-sum-exp."""
        pipeline = self.forward_stages * self.forward_block * (width + value_width)
        return _bytes(TILE * max(width, value_width) + pipeline, 1)

    def query_bytes(self, width: int, value_width: int) -> int:
        """Shared memory of the dQ kernel: queries, output gradients, keys, values."""
        return _bytes((TILE + self.query_stages * self.query_block) * (width + value_width), 0)

    def key_bytes(self, width: int, value_width: int) -> int:
        """Shared memory of the dK, dV kernel: keys, values, queries, output gradients, two float32 per query row."""
        return _bytes((TILE + self.key_stages * self.key_block) * (width + value_width), self.key_stages * 2)


def _bytes(operand_elements: int, row_buffers: int) -> int:
    """16-bit operands, one line per buffer of row values, one line for the barriers."""
    return 2 * operand_elements + LINE * (row_buffers + 1)


# Chosen by compiling for the H200: the largest blocks without spilled registers, then stages while they fit. Which of
# several spill-free choices is fastest was never measured on a device; benchmarks/LOG.md has the table.
TILES: dict[tuple[int, int], Tiles] = {
    (64, 64): Tiles(128, 3, 128, 3, 64, 3),
    (96, 96): Tiles(128, 3, 64, 3, 64, 3),
    (128, 128): Tiles(128, 2, 64, 3, 64, 2),
    (192, 128): Tiles(128, 2, 64, 2, 64, 2),
    (192, 192): Tiles(64, 3, 64, 2, 64, 2),
    (256, 256): Tiles(64, 2, 64, 1, 64, 1),
}
