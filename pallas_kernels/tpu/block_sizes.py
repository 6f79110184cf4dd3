"""Block sizes of the TPU flash kernels, per chip generation, and the vector memory that a choice needs.

They were chosen without a chip, from the instruction bundles that the compiler schedules for each candidate, weighted
with what a window wastes (`python benchmarks/tpu_block_sizes.py`). None was timed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Generation = Literal["v5e", "v6e", "tpu7x"]
Kernel = Literal["forward", "dq", "dkv"]

LANES = 128
MIB = 1 << 20
VMEM_BYTES: dict[Generation, int] = {"v5e": 128 * MIB, "v6e": 128 * MIB, "tpu7x": 64 * MIB}
# Of that, what a kernel may plan with: the compiler keeps some for itself and for its spilled registers.
USABLE_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How one kernel cuts its work. All are numbers of rows.

    query_rows: rows of queries visited together, the heads of a key head counted; the block of positions is this
      divided by the heads per key head.
    key_block: keys loaded by one grid step.
    key_tile: keys computed at once; tiles out of sight are skipped inside a block.
    lanes: queries of one head whose scores are computed at once.
    """

    query_rows: int
    key_block: int
    key_tile: int
    lanes: int = LANES

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"block_sizes: {field.name}={getattr(self, field.name)}: expected at least 1")
        if self.key_block % self.key_tile:
            raise ValueError(f"block_sizes: key_block={self.key_block} is not a multiple of key_tile={self.key_tile}")

    def query_block(self, groups: int, n_queries: int) -> int:
        """Positions per query block: a multiple of `lanes`, at least one, no more than the queries need."""
        wanted = max(self.query_rows // groups // self.lanes, 1)
        return min(wanted, -(-n_queries // self.lanes)) * self.lanes

    def fitted(self, n_keys: int) -> BlockSizes:
        """The same with key blocks no longer than the keys need."""
        tiles = min(self.key_block // self.key_tile, -(-n_keys // self.key_tile))
        return dataclasses.replace(self, key_block=tiles * self.key_tile)


@dataclasses.dataclass(frozen=True)
class KernelBlocks:
    """Block sizes of the three kernels."""

    forward: BlockSizes
    dq: BlockSizes
    dkv: BlockSizes


# The lowest cost at W = 1024 of benchmarks/results/tpu_block_sizes.json; where two are within 2 %, the fewer spills.
TABLE: dict[Generation, KernelBlocks] = {
    "v5e": KernelBlocks(
        forward=BlockSizes(2048, 1024, 512, 256), dq=BlockSizes(2048, 1024, 512), dkv=BlockSizes(2048, 1024, 512)
    ),
    "v6e": KernelBlocks(
        forward=BlockSizes(2048, 1024, 512), dq=BlockSizes(2048, 1024, 512, 256), dkv=BlockSizes(2048, 1024, 512, 256)
    ),
    "tpu7x": KernelBlocks(
        forward=BlockSizes(2048, 1024, 512), dq=BlockSizes(2048, 1024, 512, 256), dkv=BlockSizes(2048, 1024, 512, 256)
    ),
}
DEVICE_KINDS: dict[str, Generation] = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
# A chip that is not in the table gets the sizes of the one with the least vector memory.
FALLBACK: Generation = "tpu7x"


def generation() -> Generation:
    """The generation compiled for: of the abstract mesh in use (compiling for an absent chip), else of device 0."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return DEVICE_KINDS.get(kind, FALLBACK)


def default_block_sizes(chip: Generation, dtype: DTypeLike) -> KernelBlocks:
    """The table's sizes; for float32, whose products take six passes each, a quarter of the scores at once."""
    chosen = TABLE[chip]
    return chosen if jnp.dtype(dtype).itemsize == 2 else KernelBlocks(*map(_halved, dataclasses.astuple(chosen)))


def _halved(sizes: tuple[int, int, int, int]) -> BlockSizes:
    query_rows, key_block, key_tile, lanes = sizes
    return BlockSizes(query_rows // 2, key_block, key_tile // 2, lanes)


def _tiled(rows: int, columns: int, itemsize: int) -> int:
    """Bytes of a matrix in vector memory, where rows come in eights (of 32 bit) and columns in 128 lanes."""
    return math.ceil(rows * itemsize / 32) * 32 * math.ceil(columns / LANES) * LANES


def vmem_bytes(
    kernel: Kernel, sizes: BlockSizes, query_block: int, groups: int, H: int, Hv: int, itemsize: int, segmented: bool
) -> int:
    """Vector memory that a kernel plans with: its blocks twice (double buffering), its scratch, and live scores."""
    key_rows = _tiled(sizes.key_block, H, itemsize), _tiled(sizes.key_block, Hv, itemsize)
    key_columns = _tiled(H, sizes.key_block, itemsize), _tiled(Hv, sizes.key_block, itemsize)
    query_rows = groups * _tiled(query_block, H, itemsize), groups * _tiled(query_block, Hv, itemsize)
    statistic = groups * _tiled(1, query_block, 4)
    if kernel == "forward":
        blocks = query_rows[0] + query_rows[1] + key_rows[0] + key_columns[1] + statistic
        scratch = groups * _tiled(Hv, query_block, 4) + 2 * statistic
    elif kernel == "dq":
        blocks = 2 * query_rows[0] + query_rows[1] + sum(key_rows) + key_columns[0] + 2 * statistic
        scratch = groups * _tiled(H, query_block, 4)
    else:
        blocks = sum(query_rows) + 2 * sum(key_rows) + 2 * statistic
        scratch = _tiled(sizes.key_block, H, 4) + _tiled(sizes.key_block, Hv, 4)
    if segmented:
        blocks += _tiled(1, query_block, 4) + _tiled(sizes.key_block, 1, 4)
    # Scores, their mask and their weights, of all heads when the scheduler spills them.
    live = 2 * groups * _tiled(sizes.key_tile, query_block, 4)
    return 2 * blocks + scratch + live


def check_vmem(
    kernel: Kernel,
    chip: Generation,
    sizes: BlockSizes,
    query_block: int,
    groups: int,
    H: int,
    Hv: int,
    itemsize: int,
    segmented: bool,
) -> int:
    """The `vmem_limit_bytes` of a call. Raises ValueError, before anything is lowered, if the blocks do not fit."""
    needed = vmem_bytes(kernel, sizes, query_block, groups, H, Hv, itemsize, segmented)
    usable = int(VMEM_BYTES[chip] * USABLE_SHARE)
    if needed > usable:
        raise ValueError(
            f"block_sizes: {kernel} with {sizes} needs {needed / MIB:.1f} MiB of vector memory for {groups} heads per "
            f"key head of width {H}/{Hv}, {chip} has {usable / MIB:.0f} MiB to plan with: choose smaller blocks"
        )
    return min(VMEM_BYTES[chip] - 4 * MIB, 2 * needed + 8 * MIB)
