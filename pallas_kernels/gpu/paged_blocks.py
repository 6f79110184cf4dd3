"""Key and value blocks of a paged cache in shared memory: loaded by pages, widened to 16 bits, cleared of strangers.

What the kernel of paged_attention does with memory, and nothing of attention.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .extent import Steps
from .tensor_core import WGMMA, clear_outside
from .tiles import ROWS_EACH


class BlockMemory(NamedTuple):
    """Rings of loaded blocks and their barriers. The wide buffers exist where pools have 8 bits: one block per ring."""

    k: Any  # [rings * stages, block, H], as the pool holds it
    v: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    wide_k: Any  # [rings, block, H], 16 bits
    wide_v: Any
    v_clear: Any  # rows that no query may see are zero; None where one consumer has the block to itself


class Blocks(NamedTuple):
    """One of the rings."""

    memory: BlockMemory
    ring: Array
    stages: int

    @property
    def block(self) -> int:
        return self.memory.k.shape[1]

    def slot(self, i: Array) -> Array:
        return self.ring * self.stages + lax.rem(i, jnp.int32(self.stages))


class Seen(NamedTuple):
    """The positions that any query of a tile sees: all others may hold anything, NaN included."""

    first: Array
    last: Array


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory [..., rows, width] in tiles of 8 rows, with the widest swizzle whose tile divides the row."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(bytes_ for bytes_ in (128, 64, 32) if shape[-1] * itemsize % bytes_ == 0)
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)),
    )


def copies_per_block(block: int, page: int) -> int:
    """How many runs of one page a block consists of."""
    return max(block // page, 1)


def load_pages(rings: Sequence[tuple[Blocks, Steps]], keys: Any, values: Any, entries: Any, head: Array) -> None:
    """The producer: blocks of all steps of all rings from the newest to the oldest, as slots become free.

    `keys` and `values` are pools [P, page, K, width], `entries` the pages of this sequence. A block past the end of the
    table repeats the last entry: it is never seen.
    """
    counts = [steps.stop - steps.start for _, steps in rings]

    @pl.loop(jnp.int32(0), functools.reduce(jnp.maximum, counts))
    def load(i: Array) -> None:
        for (blocks, steps), count in zip(rings, counts, strict=True):
            load_step = functools.partial(_load_block, blocks, keys, values, entries, head, steps, i)
            if len(rings) == 1:
                load_step()
            else:
                pl.when(i < count)(load_step)

    for (blocks, _), count in zip(rings, counts, strict=True):
        _drain(blocks, count)


def _load_block(blocks: Blocks, keys: Any, values: Any, entries: Any, head: Array, steps: Steps, i: Array) -> None:
    memory, slot, block, page = blocks.memory, blocks.slot(i), blocks.block, keys.shape[1]
    rows, last = min(block, page), jnp.int32(entries.shape[0] - 1)
    starts = [(steps.stop - 1 - i) * block + j * rows for j in range(copies_per_block(block, page))]
    pages = [entries[jnp.minimum(lax.div(start, jnp.int32(page)), last)] for start in starts]
    for source, target, full, free in (
        (keys, memory.k, memory.k_full, memory.k_free),
        (values, memory.v, memory.v_full, memory.v_free),
    ):
        pl.when(i >= blocks.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
        for j, (start, number) in enumerate(zip(starts, pages, strict=True)):
            within = pl.ds(lax.rem(start, jnp.int32(page)), rows) if page > rows else slice(None)
            plgpu.copy_gmem_to_smem(
                source.at[number, within, head], target.at[slot, pl.ds(j * rows, rows)], full.at[slot]
            )


def _drain(blocks: Blocks, count: Array) -> None:
    @pl.loop(jnp.maximum(count - blocks.stages, 0), count)
    def drain(i: Array) -> None:
        plgpu.barrier_wait(blocks.memory.k_free.at[blocks.slot(i)])
        plgpu.barrier_wait(blocks.memory.v_free.at[blocks.slot(i)])


def key_operand(blocks: Blocks, i: Array) -> Any:
    """The keys of step i, 16 bits wide, once `await_keys` has returned."""
    memory = blocks.memory
    return memory.k.at[blocks.slot(i)] if memory.wide_k is None else memory.wide_k.at[blocks.ring]


def value_operand(blocks: Blocks, i: Array) -> Any:
    """The values of step i, 16 bits wide, once `await_values` has returned."""
    memory = blocks.memory
    return memory.v.at[blocks.slot(i)] if memory.wide_v is None else memory.wide_v.at[blocks.ring]


def await_keys(blocks: Blocks, i: Array) -> None:
    """Returns when the keys of step i can be multiplied. Those of step i - 1 must be done with."""
    memory, slot = blocks.memory, blocks.slot(i)
    plgpu.barrier_wait(memory.k_full.at[slot])
    if memory.wide_k is not None:
        _widen(memory.k.at[slot], key_operand(blocks, i))
        plgpu.barrier_arrive(memory.k_free.at[slot])


def await_values(blocks: Blocks, i: Array) -> None:
    """Returns when the values of step i can be multiplied. Those of step i - 1 must be done with."""
    memory, slot = blocks.memory, blocks.slot(i)
    plgpu.barrier_wait(memory.v_full.at[slot])
    if memory.wide_v is not None:
        _widen(memory.v.at[slot], value_operand(blocks, i))
        plgpu.barrier_arrive(memory.v_free.at[slot])


def release_keys(blocks: Blocks, i: Array) -> None:
    """Step i is done with its keys. Blocks that were widened were released at once."""
    if blocks.memory.wide_k is None:
        plgpu.barrier_arrive(blocks.memory.k_free.at[blocks.slot(i)])


def release_values(blocks: Blocks, i: Array) -> None:
    """Step i is done with its values."""
    if blocks.memory.wide_v is None:
        plgpu.barrier_arrive(blocks.memory.v_free.at[blocks.slot(i)])


def _widen(narrow: Any, wide: Any) -> None:
    """Exact: the processor turns e4m3 into float16 only, and float16 holds all of it."""
    for start in range(0, wide.shape[0], ROWS_EACH):
        rows = pl.ds(start, ROWS_EACH)
        numbers = plgpu.load(narrow.at[rows], layout=WGMMA, optimized=False)
        if jnp.issubdtype(numbers.dtype, jnp.floating):
            numbers = numbers.astype(jnp.float16).astype(jnp.float32)
        wide[rows] = numbers.astype(wide.dtype)
    _fence()


def _fence() -> None:
    """What was written by instructions is seen by the tensor cores, and comes before later copies."""
    plgpu.commit_smem()


def clear_strangers(blocks: Blocks, i: Array, start: Array, seen: Seen, me: Array) -> None:
    """Zeros in those value rows of step i, at positions from `start` on, that no query of the tile sees.

    Their weights are zero, but a product of zero and NaN is NaN. Consumers share the rows and wait for each other.
    """
    values = value_operand(blocks, i)
    block = blocks.block

    @pl.when((start < seen.first) | (start + (block - 1) > seen.last))
    def clear() -> None:
        for piece in range(block // ROWS_EACH):
            clear_piece = functools.partial(
                clear_outside,
                values.at[pl.ds(piece * ROWS_EACH, ROWS_EACH)],
                seen.first - (start + piece * ROWS_EACH),
                seen.last - (start + piece * ROWS_EACH),
            )
            if blocks.memory.v_clear is None:
                clear_piece()
            else:
                pl.when(me == piece)(clear_piece)
        _fence()
        if blocks.memory.v_clear is not None:
            plgpu.barrier_arrive(blocks.memory.v_clear)
            plgpu.barrier_wait(blocks.memory.v_clear)
