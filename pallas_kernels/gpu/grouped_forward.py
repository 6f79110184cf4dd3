"""The product of grouped_matmul on Hopper, and of its gradient by rows: tiles of rows of one group times its matrix."""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from .grouped_plan import CHUNK, DEPTH, GroupedPlan, Visits
from .grouped_program import Ring, banded, chunks, in_roles, in_turns, run_program, store
from .tensor_core import Accumulator, accumulating, as_rows, as_tile, tile, tile_and_rows
from .tiles import ROWS_EACH

# Tiles of rows that go through the columns together: 16 of 128 rows, and the 8 column tiles that 132 programs then
# have at a time, are 34 MB at 4096 inputs, of a cache of 50.
BAND = 16


class Operands(NamedTuple):
    """Arrays in device memory."""

    x: Float[Array, "M I"]
    w: Float[Array, "E O I"]  # or [E, I, O], where the kernel is told so
    visits: Visits


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

    `turned`: the matrices are [E, I, O]. I is a multiple of `DEPTH`, O of `plan.columns`.
    """
    dtype, (n_rows, _), (_, *widths) = operands.x.dtype, operands.x.shape, operands.w.shape
    columns = (DEPTH, plan.columns) if turned else (plan.columns, DEPTH)
    shared = Shared(
        x=tile_and_rows((plan.stages, plan.rows, DEPTH), dtype, interpreted=bool(interpret)),
        w=tile((plan.stages, *columns), dtype),
        chunks=chunks(plan, dtype, interpret),
        ring=Ring.of(plan, copies=2),
    )
    body = functools.partial(_program, plan=plan, turned=turned, interpreted=bool(interpret))
    out = jax.ShapeDtypeStruct((n_rows, widths[1 if turned else 0]), dtype)
    return run_program(body, "grouped_matmul", operands, shared, out, plan, interpret)


def _program(gmem: Operands, out: Any, shared: Shared, *, plan: GroupedPlan, turned: bool, interpreted: bool) -> None:
    n_steps, n_columns, used = gmem.x.shape[1] // DEPTH, out.shape[1] // plan.columns, gmem.visits.used[0]
    n_tiles, number = in_turns(used * n_columns, plan.programs)

    def tile_of(j: Array) -> Tile:
        visit, column = banded(number(j), used, n_columns, BAND)
        expert, start, stop = (table[visit] for table in gmem.visits[:3])
        return Tile(expert, start, stop, column * plan.columns)

    def consume(me: Array) -> None:
        @pl.loop(jnp.int32(0), n_tiles)
        def multiply(j: Array) -> None:
            product = functools.partial(_product, shared, me, j * n_steps, n_steps, turned)
            acc = accumulating(product, fresh=[(ROWS_EACH, plan.columns)], interpreted=interpreted)
            here = tile_of(j)
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

    @pl.loop(jnp.int32(0), jnp.int32(n_steps))
    def load(i: Array) -> None:
        shared.ring.await_free(begin + i)
        slot = shared.ring.slot(begin + i)
        rows, depth = pl.ds(here.start, as_rows(shared.x).shape[1]), pl.ds(i * DEPTH, DEPTH)
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
