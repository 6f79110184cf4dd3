"""Matrix products on the tensor cores of one warpgroup: wgmma accumulators, and their stand-ins under the interpreter.

Mosaic GPU's interpreter knows products of two operands in shared memory, but neither an accumulator that starts from a
value nor a left operand in registers. Kernels therefore reach both through `accumulating`, and are otherwise the same
code on the device and on the CPU.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false
# The API is that of jax 0.11; the oldest jax that the rest of the package supports lacks parts of it.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA  # how 128 threads hold a [64, n] float32 accumulator
ROWS = WGMMA.reduce(1)  # one value per row of it
COLUMNS = WGMMA.reduce(0)  # one value per column of it
SWIZZLE = 128  # bytes of a row of the widest swizzle


@runtime_checkable
class Accumulator(Protocol):
    """A float32 sum in registers that matrix products are added to."""

    def add(self, left: Any, right: Any) -> None:
        """Issues `sum += left @ right`: left in registers or shared memory, right in shared memory."""
        ...

    def value(self, in_flight: int) -> jax.Array:
        """The sum, once no more than `in_flight` of the products issued last are still running."""
        ...


class _DeviceAccumulator:
    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def add(self, left: Any, right: Any) -> None:
        plgpu.wgmma(self.ref, left, right)

    def value(self, in_flight: int) -> jax.Array:
        return plgpu.wgmma_accumulator_load(self.ref, wait_n=in_flight)


class _WatchedAccumulator(_DeviceAccumulator):
    """Also reads the operands, since the interpreter's race detector does not watch what its products read."""

    def add(self, left: Any, right: Any) -> None:
        _ = left[...], right[...]
        plgpu.commit_smem()
        super().add(left, right)


class _InterpretedAccumulator:
    """Reads the right operand at once. The fence orders that read before a later copy into the same buffer."""

    def __init__(self, start: jax.Array) -> None:
        self.sum = start

    def add(self, left: Any, right: Any) -> None:
        self.sum = self.sum + jnp.dot(left[...], right[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()

    def value(self, in_flight: int) -> jax.Array:
        del in_flight  # every product is finished when it is issued
        return self.sum


def accumulating(
    body: Callable[..., Any],
    *,
    fresh: Sequence[tuple[int, int]] = (),
    continued: Sequence[jax.Array] = (),
    interpreted: bool,
) -> Any:
    """Calls `body(*accumulators)`, one per shape in `fresh` (from zero), then one per array in `continued`.

    Returns what body returns. Products still in flight when body returns are the caller's mistake: body must ask each
    accumulator for its value with `in_flight` small enough.
    """
    if interpreted:
        return _interpreted(body, fresh, continued)

    def run(*refs: Any) -> Any:
        for ref, start in zip(refs[len(fresh) :], continued, strict=True):
            ref[...] = start
        return body(*map(_DeviceAccumulator, refs))

    shapes = [*fresh, *(start.shape for start in continued)]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _interpreted(body: Callable[..., Any], fresh: Sequence[tuple[int, int]], continued: Sequence[jax.Array]) -> Any:
    def run(*refs: Any) -> Any:
        return body(*map(_WatchedAccumulator, refs), *map(_InterpretedAccumulator, continued))

    if not fresh:
        return run()
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in fresh))


def zeros(rows: int, columns: int) -> jax.Array:
    """A float32 [rows, columns] of zeros as an accumulator's start."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)


def per_row(value: float, rows: int) -> jax.Array:
    """A float32 [rows] of one value, laid out as the rows of an accumulator."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROWS)


def across(row_values: jax.Array, columns: int) -> jax.Array:
    """[rows] repeated along the columns of an accumulator: [rows, columns]."""
    return jax.lax.broadcast_in_dim(row_values, (row_values.shape[0], columns), [0])


def down(column_values: jax.Array, rows: int) -> jax.Array:
    """[columns] repeated along the rows of an accumulator: [rows, columns]."""
    return jax.lax.broadcast_in_dim(column_values, (rows, column_values.shape[0]), [1])


def tile(shape: tuple[int, ...], dtype: Any, block: int = 64) -> Any:
    """Shared memory for matrix operands [..., rows, width], tiled and swizzled as TMA and wgmma want it.

    The widest swizzle is used whose tile divides the row and the `block` of rows that a product may sum over: 128 bytes
    for multiples of 64, else 64 bytes. All operands of a product need the same.
    """
    columns = 64 if shape[-1] % 64 == 0 and block % 64 == 0 else 32
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    )


def tile_and_rows(shape: tuple[int, ...], dtype: Any, *, interpreted: bool) -> Any:
    """Shared memory for matrix operands [..., rows, 128 bytes] that copies may fill or read from any row to any other.

    TMA copies tiles of 8 rows from multiples of 8 only. With 128 bytes a row, a tile's rows lie one behind the other:
    the same bytes are also plain swizzled rows. They are `as_tile` for products and registers, `as_rows` for copies.
    The interpreter, which knows no swizzles, takes one view for both.
    """
    columns, swizzle = SWIZZLE // jnp.dtype(dtype).itemsize, plgpu.SwizzleTransform(SWIZZLE)
    whole = plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))
    if interpreted:
        return (whole,)
    return plgpu.RefUnion(whole, plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((columns,)), swizzle)))


def as_tile(memory: Any) -> Any:
    """What `tile_and_rows` made, as matrix operands."""
    return memory[0]


def as_rows(memory: Any) -> Any:
    """What `tile_and_rows` made, as rows that a copy may begin and end at."""
    return memory[-1]


def clear_outside(block: Any, first: jax.Array, last: jax.Array) -> None:
    """Zeros in the rows of a matrix operand before `first` and behind `last`. A fence must follow."""
    row = plgpu.broadcasted_iota(jnp.int32, block.shape, 0, layout=WGMMA)
    values = plgpu.load(block, layout=WGMMA, optimized=False)
    block[...] = jnp.where((row >= first) & (row <= last), values, jnp.zeros_like(values))


def columns_within(low: jax.Array | None, high: jax.Array | None, columns: int) -> jax.Array:
    """True at [row, column] where `low[row] <= column <= high[row]`; a limit that is None does not bind.

    Written as (column & ~7) against (limit - (column & 7)): a thread holds two columns of every eight, so the left side
    is a constant of the instruction and the right side one of four registers. Compared plainly, the columns themselves
    are kept in registers across the loop, and the kernel spills.
    """
    rows = next(limit.shape[0] for limit in (low, high) if limit is not None)
    column = plgpu.broadcasted_iota(jnp.int32, (rows, columns), 1, layout=WGMMA)
    within, eights = column & 7, column & ~7
    if low is None:
        return eights <= across(high, columns) - within
    seen = eights >= across(low, columns) - within
    return seen if high is None else seen & (eights <= across(high, columns) - within)


def row_indices(rows: int) -> jax.Array:
    """int32 [rows] 0, 1, ..., laid out as the rows of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROWS)
