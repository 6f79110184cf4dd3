"""What both kernels of grouped_matmul on Hopper share: persistent programs, their ring of loaded steps, the store.

One program per multiprocessor takes tile after tile. Its producer warpgroup loads the steps of one tile after the other
without a pause; one or two consumers of 64 rows each multiply, with one product issued before the last has ended.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .extent import ceil_div
from .grouped_plan import CHUNK, GroupedPlan
from .launch import CONSUMER_REGISTERS, PRODUCER_REGISTERS
from .tensor_core import as_rows, as_tile, tile_and_rows
from .tiles import ROWS_EACH


class Ring(NamedTuple):
    """Barriers of the slots that loads go through; load n of a program goes to slot `n % stages`."""

    full: Any
    free: Any

    @staticmethod
    def of(plan: GroupedPlan, copies: int) -> Ring:
        """Scratch for steps of so many copies each, that all consumers are done with before a slot is filled again."""
        return Ring(
            plgpu.Barrier(num_barriers=plan.stages, num_arrivals=copies),
            plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.consumers),
        )

    @property
    def stages(self) -> int:
        return self.full.shape[0]

    def slot(self, n: Array) -> Array:
        return lax.rem(n, jnp.int32(self.stages))

    def await_free(self, n: Array) -> None:
        """Before load n."""
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[self.slot(n)]))

    def await_loaded(self, n: Array) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(n)])

    def release(self, n: Array) -> None:
        """A consumer has done with load n."""
        plgpu.barrier_arrive(self.free.at[self.slot(n)])

    def drain(self, n_loads: Array) -> None:
        """Until the consumers are done with the last of all loads, so that no barrier ends out of step."""

        @pl.loop(jnp.maximum(n_loads - self.stages, 0), n_loads)
        def wait(n: Array) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(n)])


def in_turns(total: Array | int, programs: int) -> tuple[Array, Callable[[Array], Array]]:
    """How many of `total` tiles this program has, and the number of its j-th: every `programs`-th one."""
    first = lax.axis_index("program")
    return ceil_div(jnp.maximum(total - first, 0), programs), lambda j: first + j * programs


def banded(index: Array, n_rows: Array | int, n_columns: int, band: int) -> tuple[Array, Array]:
    """Row and column of tile `index`: bands of rows, columns within a band, rows within a column.

    Programs that run at the same time thus read few rows and few columns, which come from the cache.
    """
    number = lax.div(index, jnp.int32(band * n_columns))
    height = jnp.minimum(n_rows - number * band, band).astype(jnp.int32)
    rest = index - number * (band * n_columns)
    column = lax.div(rest, height)
    return number * band + rest - column * height, column


def run_program(
    body: Callable[..., None], name: str, operands: Any, shared: Any, out_type: Any, plan: GroupedPlan, interpret: Any
) -> Any:
    """Runs `body(operands, out, shared)` in the warpgroups of every program."""
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        scratch_types=[shared],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(operands)


def in_roles(plan: GroupedPlan, consume: Callable[[Array], None], produce: Callable[[], None]) -> None:
    """`consume(which)` in the warpgroups that multiply, `produce()` in the last. Two consumers need more registers."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.consumers)
    def consumer() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume(warpgroup)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == plan.consumers)
    def producer() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()


def chunks(plan: GroupedPlan, dtype: Any, interpret: Any) -> Any:
    """Shared memory for what is stored."""
    return tile_and_rows((plan.consumers, plan.slots, ROWS_EACH, CHUNK), dtype, interpreted=bool(interpret))


def store(acc: Array, me: Array, memory: Any, rows: Array, place: Callable[[Array, int, int], Any]) -> None:
    """The first `rows` rows of a consumer's sum; `place(row, count, column)` is where so many rows of a chunk go."""
    slots = as_tile(memory).shape[1]

    @pl.when(rows > 0)
    def some() -> None:
        for c in range(acc.shape[1] // CHUNK):
            slot, column = c % slots, c * CHUNK
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            as_tile(memory)[me, slot] = acc[:, column : column + CHUNK].astype(as_tile(memory).dtype)
            plgpu.commit_smem()
            _copy_rows(as_rows(memory).at[me, slot], rows, lambda row, count, column=column: place(row, count, column))
            plgpu.commit_smem_to_gmem_group()


def _copy_rows(chunk: Any, rows: Array, place: Callable[[Array, int], Any]) -> None:
    """How many rows a copy has is static: one for every power of two in `rows`. The largest come first."""
    for count in (1 << bit for bit in range(ROWS_EACH.bit_length())):
        row = rows & ~(2 * count - 1)
        source, target = chunk.at[pl.ds(row, count)], place(row, count)
        copy = functools.partial(plgpu.copy_smem_to_gmem, source, target, commit_group=False)
        pl.when((rows & count) != 0)(copy)
