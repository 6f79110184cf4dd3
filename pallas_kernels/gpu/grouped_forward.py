"""The product of grouped_matmul on Hopper, and of its gradient by rows: tiles of rows of one group times its matrix."""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from .extent import floor_div
from .grouped_plan import CHUNK, DEPTH_BYTES, GroupedPlan, Visits
from .grouped_program import Ring, banded, chunks, in_roles, in_turns, run_program, store
from .tensor_core import ROWS, Accumulator, accumulating, across, as_rows, as_tile, tile, tile_and_rows, zeros
from .tiles import ROWS_EACH

# Tiles of rows that go through the columns together: 16 of 128 rows, and the 8 column tiles that 132 programs then
# have at a time, are 34 MB at 4096 inputs, of a cache of 50.
BAND = 16


class Scales(NamedTuple):
    """What sums over blocks of 128 inputs are multiplied with; x has a row of `plan.rows` numbers more than needed."""

    x: Float[Array, "blocks M"]
    w: Float[Array, "E row_blocks blocks"]


class Operands(NamedTuple):
    """Arrays in device memory."""

    x: Float[Array, "M I"]
    w: Float[Array, "E O I"]  # or [E, I, O], where the kernel is told so
    visits: Visits
    scales: Scales | None = None  # with x and w of 8 bits


class Shared(NamedTuple):
    """Shared memory and barriers of one program."""

    x: Any
    w: Any
    chunks: Any
    ring: Ring


class Tile(NamedTuple):
    """Where a tile of the result is: rows `start .. stop - 1`, and its columns."""

    expert: Array
    start: Array
    stop: Array
    column: Array


def grouped_forward(operands: Operands, *, plan: GroupedPlan, turned: bool, interpret: Any) -> Float[Array, "M O"]:
    """The products of the rows in groups; rows past the last group are left as they were.

    `turned`: the matrices are [E, I, O]. I is a multiple of what `DEPTH_BYTES` hold, O of `plan.columns`. With scales,
    the result is bfloat16, and a tile has the columns of one block at most.
    """
    dtype, (n_rows, _), (_, *widths) = operands.x.dtype, operands.x.shape, operands.w.shape
    depth, out_dtype = DEPTH_BYTES // dtype.itemsize, dtype if operands.scales is None else jnp.dtype(jnp.bfloat16)
    interpreted = bool(interpret)
    if turned:
        w = tile((plan.stages, depth, plan.columns), dtype)
    else:
        w = as_tile(tile_and_rows((plan.stages, plan.columns, depth), dtype, interpreted=True))
    shared = Shared(
        x=tile_and_rows((plan.stages, plan.rows, depth), dtype, interpreted=interpreted),
        w=w,
        chunks=chunks(plan, out_dtype, interpret),
        ring=Ring.of(plan, copies=2),
    )
    body = functools.partial(_program, plan=plan, turned=turned, interpreted=interpreted)
    out = jax.ShapeDtypeStruct((n_rows, widths[1 if turned else 0]), out_dtype)
    return run_program(body, "grouped_matmul", operands, shared, out, plan, interpret)


def _program(gmem: Operands, out: Any, shared: Shared, *, plan: GroupedPlan, turned: bool, interpreted: bool) -> None:
    depth = as_tile(shared.x).shape[2]
    n_steps, n_columns, used = gmem.x.shape[1] // depth, out.shape[1] // plan.columns, gmem.visits.used[0]
    n_tiles, number = in_turns(used * n_columns, plan.programs)

    def tile_of(j: Array) -> Tile:
        visit, column = banded(number(j), used, n_columns, BAND)
        expert, start, stop = (table[visit] for table in gmem.visits[:3])
        return Tile(expert, start, stop, column * plan.columns)

    def consume(me: Array) -> None:
        @pl.loop(jnp.int32(0), n_tiles)
        def multiply(j: Array) -> None:
            here, begin = tile_of(j), j * n_steps
            if gmem.scales is not None:
                acc = _scaled_product(gmem.scales, shared, me, begin, n_steps, here, interpreted)
            else:
                product = functools.partial(_product, shared, me, begin, n_steps, turned)
                acc = accumulating(product, fresh=[(ROWS_EACH, plan.columns)], interpreted=interpreted)
            first = here.start + me * ROWS_EACH
            # The rows behind those of the group are another tile's.
            store(
                acc,
                me,
                shared.chunks,
                jnp.clip(here.stop - first, 0, ROWS_EACH),
                lambda row, count, column: out.at[pl.ds(first + row, count), pl.ds(here.column + column, CHUNK)],
            )

    def produce() -> None:
        @pl.loop(jnp.int32(0), n_tiles)
        def load(j: Array) -> None:
            _load_tile(gmem, shared, tile_of(j), j * n_steps, n_steps, turned)

        shared.ring.drain(n_tiles * n_steps)

    in_roles(plan, consume, produce)


def _load_tile(gmem: Operands, shared: Shared, here: Tile, begin: Array, n_steps: int, turned: bool) -> None:
    """All steps of a tile, from load `begin` on. Rows past the end of x are zeros."""
    n_columns = shared.w.shape[2 if turned else 1]
    _, n_rows, n_inputs = as_rows(shared.x).shape

    @pl.loop(jnp.int32(0), jnp.int32(n_steps))
    def load(i: Array) -> None:
        shared.ring.await_free(begin + i)
        slot = shared.ring.slot(begin + i)
        rows, depth = pl.ds(here.start, n_rows), pl.ds(i * n_inputs, n_inputs)
        columns = pl.ds(here.column, n_columns)
        matrix = gmem.w.at[here.expert, depth, columns] if turned else gmem.w.at[here.expert, columns, depth]
        plgpu.copy_gmem_to_smem(gmem.x.at[rows, depth], as_rows(shared.x).at[slot], shared.ring.full.at[slot])
        plgpu.copy_gmem_to_smem(matrix, shared.w.at[slot], shared.ring.full.at[slot])


def _product(shared: Shared, me: Array, begin: Array, n_steps: int, turned: bool, acc: Accumulator) -> Array:
    """A consumer's rows of a tile."""
    ring, rows = shared.ring, pl.ds(me * ROWS_EACH, ROWS_EACH)

    def issue(n: Array) -> None:
        ring.await_loaded(n)
        matrix = shared.w.at[ring.slot(n)]
        acc.add(as_tile(shared.x).at[ring.slot(n), rows], matrix if turned else matrix.T)

    issue(begin)

    @pl.loop(begin + 1, begin + n_steps)
    def step(n: Array) -> None:
        issue(n)
        plgpu.wgmma_wait(1)
        ring.release(n - 1)

    total = acc.value(0)
    ring.release(begin + (n_steps - 1))
    return total


def _scaled_product(
    scales: Scales, shared: Shared, me: Array, begin: Array, n_steps: int, here: Tile, interpreted: bool
) -> Array:
    """The same where every step is a block with scales of its own: its sum is finished, scaled, and added in float32.

    That is also as long as the tensor cores may add up 8-bit products, which they do with fewer bits than float32 has.
    While one consumer scales, the other one multiplies.
    """
    ring, columns = shared.ring, shared.w.shape[1]
    rows, block = pl.ds(here.start + me * ROWS_EACH, ROWS_EACH), floor_div(here.column, shared.w.shape[2])

    def step(i: Array, total: Array) -> Array:
        slot = ring.slot(begin + i)
        by_row = plgpu.load(scales.x.at[i, rows], layout=ROWS, optimized=False) * scales.w[here.expert, block, i]
        ring.await_loaded(begin + i)

        def product(acc: Accumulator) -> Array:
            acc.add(as_tile(shared.x).at[slot, pl.ds(me * ROWS_EACH, ROWS_EACH)], shared.w.at[slot].T)
            return acc.value(0)

        part = accumulating(product, fresh=[(ROWS_EACH, columns)], interpreted=interpreted)
        ring.release(begin + i)
        return total + part * across(by_row, columns)

    return lax.fori_loop(jnp.int32(0), jnp.int32(n_steps), step, zeros(ROWS_EACH, columns))
