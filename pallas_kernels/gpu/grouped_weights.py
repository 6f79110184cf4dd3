"""The gradient by the matrices of grouped_matmul on Hopper: of each group, the sum over its rows of d_out^T x."""
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
from jaxtyping import Float, Int

from .extent import ceil_div, floor_div
from .grouped_plan import CHUNK, GroupedPlan
from .grouped_program import Ring, banded, chunks, in_roles, in_turns, run_program, store
from .tensor_core import Accumulator, accumulating, clear_outside, tile
from .tiles import ROWS_EACH

# Tiles of outputs that go through the inputs together: 8 of 128, and 16 of 256 inputs, for 132 programs at a time.
BAND = 8
DEPTH = 64  # rows of a step
# Loaded steps begin at rows that are multiples of a swizzled tile's rows.
ALIGNED = 8


class Operands(NamedTuple):
    """Arrays in device memory; their rows are a multiple of `ALIGNED`."""

    d_out: Float[Array, "M O"]
    x: Float[Array, "M I"]
    starts: Int[Array, "E"]
    stops: Int[Array, "E"]


class Shared(NamedTuple):
    """Shared memory and barriers of one program."""

    d_out: Any  # a part for each consumer
    x: Any
    chunks: Any
    ring: Ring
    cleared: Any


class Tile(NamedTuple):
    """Where a tile of the result is, and which rows are summed up: `start .. stop - 1`, in steps from `base` on."""

    expert: Array
    output: Array
    column: Array
    start: Array
    stop: Array
    base: Array
    n_steps: Array


def grouped_weights(operands: Operands, *, plan: GroupedPlan, interpret: Any) -> Float[Array, "E O I"]:
    """The gradient of every matrix; zeros for groups without rows. Rows of no group may hold anything."""
    dtype, n_experts = operands.x.dtype, len(operands.starts)
    n_out, n_in = operands.d_out.shape[1], operands.x.shape[1]
    shared = Shared(
        d_out=tile((plan.stages, plan.consumers, DEPTH, ROWS_EACH), dtype),
        x=tile((plan.stages, DEPTH, plan.columns), dtype),
        chunks=chunks(plan, dtype, interpret),
        ring=Ring.of(plan, copies=plan.consumers + 1),
        cleared=plgpu.Barrier(num_arrivals=plan.consumers),
    )
    body = functools.partial(_program, plan=plan, interpreted=bool(interpret))
    out = jax.ShapeDtypeStruct((n_experts, n_out, n_in), dtype)
    return run_program(body, "grouped_weights", operands, shared, out, plan, interpret)


def _program(gmem: Operands, out: Any, shared: Shared, *, plan: GroupedPlan, interpreted: bool) -> None:
    n_experts, n_rows, n_columns = out.shape[0], out.shape[1] // plan.rows, out.shape[2] // plan.columns
    n_tiles, number = in_turns(jnp.int32(n_experts * n_rows * n_columns), plan.programs)

    def tile_of(j: Array) -> Tile:
        expert = floor_div(number(j), n_rows * n_columns)
        row, column = banded(number(j) - expert * (n_rows * n_columns), n_rows, n_columns, BAND)
        start, stop = gmem.starts[expert], gmem.stops[expert]
        base = floor_div(start, ALIGNED) * ALIGNED
        n_steps = jnp.where(stop > start, ceil_div(stop - base, DEPTH), 0)
        return Tile(expert, row * plan.rows, column * plan.columns, start, stop, base, n_steps)

    def consume(me: Array) -> None:
        def multiply(j: Array, begin: Array) -> Array:
            here = tile_of(j)
            total = functools.partial(_sum, shared, me, begin, here)
            acc = accumulating(total, fresh=[(ROWS_EACH, plan.columns)], interpreted=interpreted)
            first = here.output + me * ROWS_EACH
            store(
                acc,
                me,
                shared.chunks,
                jnp.int32(ROWS_EACH),
                lambda row, count, column: out.at[
                    here.expert, pl.ds(first + row, count), pl.ds(here.column + column, CHUNK)
                ],
            )
            return begin + here.n_steps

        lax.fori_loop(jnp.int32(0), n_tiles, multiply, jnp.int32(0))

    def produce() -> None:
        def load(j: Array, begin: Array) -> Array:
            _load_tile(gmem, shared, tile_of(j), begin)
            return begin + tile_of(j).n_steps

        shared.ring.drain(lax.fori_loop(jnp.int32(0), n_tiles, load, jnp.int32(0)))

    in_roles(plan, consume, produce)


def _load_tile(gmem: Operands, shared: Shared, here: Tile, begin: Array) -> None:
    """All steps of a tile, from load `begin` on. Rows past the end are zeros."""
    _, consumers, _, width = shared.d_out.shape

    @pl.loop(jnp.int32(0), here.n_steps)
    def load(i: Array) -> None:
        shared.ring.await_free(begin + i)
        slot = shared.ring.slot(begin + i)
        rows = pl.ds(pl.multiple_of(here.base + i * DEPTH, ALIGNED), DEPTH)
        for which in range(consumers):
            outputs = gmem.d_out.at[rows, pl.ds(here.output + which * width, width)]
            plgpu.copy_gmem_to_smem(outputs, shared.d_out.at[slot, which], shared.ring.full.at[slot])
        inputs = gmem.x.at[rows, pl.ds(here.column, shared.x.shape[2])]
        plgpu.copy_gmem_to_smem(inputs, shared.x.at[slot], shared.ring.full.at[slot])


def _sum(shared: Shared, me: Array, begin: Array, here: Tile, acc: Accumulator) -> Array:
    """A consumer's outputs of a tile. Only the first and the last step may hold rows of other groups."""
    ring, last = shared.ring, here.n_steps - 1

    def issue(i: Array) -> None:
        slot = ring.slot(begin + i)
        acc.add(shared.d_out.at[slot, me].T, shared.x.at[slot])

    @pl.loop(jnp.int32(0), jnp.minimum(here.n_steps, 1))
    def first_step(i: Array) -> None:
        ring.await_loaded(begin + i)
        _clear_strangers(shared, me, ring.slot(begin + i), here, i)
        issue(i)

    @pl.loop(jnp.int32(1), last)
    def step(i: Array) -> None:
        ring.await_loaded(begin + i)
        issue(i)
        plgpu.wgmma_wait(1)
        ring.release(begin + i - 1)

    @pl.loop(jnp.maximum(last, 1), here.n_steps)
    def last_step(i: Array) -> None:
        plgpu.wgmma_wait(0)
        ring.release(begin + i - 1)
        ring.await_loaded(begin + i)
        _clear_strangers(shared, me, ring.slot(begin + i), here, i)
        issue(i)

    total = acc.value(0)
    pl.when(here.n_steps > 0)(lambda: ring.release(begin + last))
    return total


def _clear_strangers(shared: Shared, me: Array, slot: Array, here: Tile, i: Array) -> None:
    """Zeros in the rows of step i that are not of the group, in both operands: a product of zero and NaN is NaN.

    Each consumer clears its own outputs and its share of the inputs, and waits for the other.
    """
    first, last = here.start - (here.base + i * DEPTH), here.stop - 1 - (here.base + i * DEPTH)
    consumers, share = shared.d_out.shape[1], shared.x.shape[2] // shared.d_out.shape[1]

    @pl.when((first > 0) | (last < DEPTH - 1))
    def clear() -> None:
        clear_outside(shared.d_out.at[slot, me], first, last)
        for which in range(consumers):
            inputs = shared.x.at[slot, :, pl.ds(which * share, share)]
            pl.when(me == which)(functools.partial(clear_outside, inputs, first, last))
        plgpu.commit_smem()
        if consumers > 1:
            plgpu.barrier_arrive(shared.cleared)
            plgpu.barrier_wait(shared.cleared)
