"""Tile sizes of the Hopper kernels by head width, and the shared memory that they take. Numbers, no kernels."""

from __future__ import annotations

import dataclasses

CONSUMERS = 2  # warpgroups that multiply; a third one loads
ROWS_EACH = 64  # rows of a wgmma, and of a consumer
TILE = CONSUMERS * ROWS_EACH
SHARED_MEMORY_LIMIT = 232_448  # bytes that one block of threads may use on sm_90
LINE = 1024  # swizzled buffers start on multiples of this


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Rows of one loaded block, and how many blocks are in flight."""

    block: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The pipelines of the kernels. Where `value` is None, the kernel of `key` computes both dK and dV."""

    forward: Pipeline  # blocks of keys
    query: Pipeline  # dQ: blocks of keys
    key: Pipeline  # dK: blocks of queries
    value: Pipeline | None = None  # dV: blocks of queries

    def bytes_needed(self, width: int, value_width: int) -> dict[str, int]:
        """Shared memory of each kernel."""
        both = width + value_width
        by_queries = {"dk, dv": self.key} if self.value is None else {"dk": self.key, "dv": self.value}
        return {
            # The outputs lie over the queries; the log-sum-exp of a tile takes one line.
            "forward": _bytes(TILE * max(width, value_width), self.forward, both, 1),
            "dq": _bytes(TILE * both, self.query, both, 0),
            **{name: _bytes(TILE * both, pipeline, both, 2 * pipeline.stages) for name, pipeline in by_queries.items()},
        }


def _bytes(resident: int, pipeline: Pipeline, width: int, row_buffers: int) -> int:
    """Resident and pipelined 16-bit elements, a line per buffer of row values, and one line for the barriers."""
    return 2 * (resident + pipeline.stages * pipeline.block * width) + LINE * (row_buffers + 1)


# By (head width, value width), narrowest first. Chosen by compiling for the H200: the largest blocks without spilled
# registers, then stages while they fit. Which of several spill-free choices is fastest was never measured on a device.
# At width 128 two float32 gradients of 64 rows and both score blocks fill the registers: beyond it dK and dV are two
# runs. Blocks of 32 rows are for shared memory's sake.
TILES: dict[tuple[int, int], Tiles] = {
    (64, 64): Tiles(Pipeline(128, 3), Pipeline(64, 3), Pipeline(64, 3)),
    (96, 96): Tiles(Pipeline(128, 3), Pipeline(64, 3), Pipeline(64, 3)),
    (128, 128): Tiles(Pipeline(128, 2), Pipeline(64, 3), Pipeline(64, 2)),
    (192, 128): Tiles(Pipeline(128, 2), Pipeline(64, 3), Pipeline(64, 2), Pipeline(64, 2)),
    (192, 192): Tiles(Pipeline(64, 3), Pipeline(32, 4), Pipeline(64, 2), Pipeline(64, 2)),
    (256, 256): Tiles(Pipeline(64, 2), Pipeline(32, 3), Pipeline(32, 2), Pipeline(32, 2)),
}
