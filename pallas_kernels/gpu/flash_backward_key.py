"""The dK, dV kernel of flash_attention on Hopper: a tile of 128 keys walks over the query blocks that see it.

All query heads of a key head are walked by the same tile, so that their sum stays in float32 registers. Scores are
computed transposed, [keys, queries]: the weights are then left operands in registers for both gradients. Where the two
sums do not fit the registers together, one run of the kernel computes dK and another one dV.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .extent import Extent, Steps, query_limits, query_steps
from .flash_backward_query import Operands
from .flash_forward import LOG2_E, mask_scores
from .launch import in_roles, launch
from .spans import read_limits, read_steps
from .tensor_core import COLUMNS, Accumulator, accumulating, down, row_indices, tile, zeros
from .tiles import CONSUMERS, ROWS_EACH, TILE


class Shared(NamedTuple):
    """Shared memory and barriers of one tile."""

    k: Any  # dk leaves from here
    v: Any  # dv leaves from here
    q: Any
    d_out: Any
    lse: Any
    delta: Any
    k_full: Any
    q_full: Any
    d_out_full: Any
    free: Any


Sums = Literal["both", "keys", "values"]


class Consumer(NamedTuple):
    """What one consumer needs at every step."""

    shared: Shared
    me: Array  # which consumer
    limits: tuple[Array, Array | None]
    n_steps: Array  # steps of all heads together
    scale: float  # of the scores, times log2(e)
    sums: Sums
    interpreted: bool


def flash_backward_key(
    operands: Operands, *, extent: Extent, scale: float, block: int, stages: int, interpret: Any, sums: Sums = "both"
) -> tuple[Array, ...]:
    """The gradients of keys [B, S, K, H] and values [B, S, K, Hv], or the one that `sums` names."""
    (B, S, K, H), dtype = operands.k.shape, operands.k.dtype
    Hv = operands.v.shape[3]
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=2)
    shared = Shared(
        k=tile((CONSUMERS, ROWS_EACH, H), dtype, block),
        v=tile((CONSUMERS, ROWS_EACH, Hv), dtype, block),
        q=tile((stages, block, H), dtype, block),
        d_out=tile((stages, block, Hv), dtype, block),
        lse=plgpu.SMEM((stages, block), jnp.float32),
        delta=plgpu.SMEM((stages, block), jnp.float32),
        k_full=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        q_full=full,
        d_out_full=full,
        free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
    )
    return launch(
        functools.partial(_tile, extent=extent, scale=scale, block=block, sums=sums, interpreted=bool(interpret)),
        f"flash_backward_key_{sums}",
        operands,
        shared,
        tuple(jax.ShapeDtypeStruct((B, S, K, width), dtype) for width in _of(sums, H, Hv)),
        (K, S // TILE, B),
        interpret,
    )


def _of(sums: Sums, keys: Any, values: Any) -> tuple[Any, ...]:
    """Of something for keys and something for values, what `sums` needs."""
    return {"both": (keys, values), "keys": (keys,), "values": (values,)}[sums]


def _tile(gmem: Operands, *refs: Any, extent: Extent, scale: float, block: int, sums: Sums, interpreted: bool) -> None:
    *gradients, shared = refs
    warpgroup, batch, head = lax.axis_index("warpgroup"), lax.axis_index("batch"), lax.axis_index("head")
    tile_index = lax.axis_index("tile")  # early keys are seen by most queries where there is no window: they go first
    steps, limits_of = _view_of_queries(gmem, extent, batch, tile_index, warpgroup, block)
    group = gmem.q.shape[2] // gmem.k.shape[2]

    def consume() -> None:
        rows = pl.ds(tile_index * TILE + warpgroup * ROWS_EACH, ROWS_EACH)
        k_tile, v_tile, arrived = shared.k.at[warpgroup], shared.v.at[warpgroup], shared.k_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(gmem.k.at[batch, rows, head], k_tile, arrived)
        plgpu.copy_gmem_to_smem(gmem.v.at[batch, rows, head], v_tile, arrived)
        plgpu.barrier_wait(arrived)
        count = (steps.stop - steps.start) * group
        consumer = Consumer(shared, warpgroup, limits_of(rows), count, scale * LOG2_E, sums, interpreted)
        totals = _walk(consumer, steps, group)
        for total, factor, leaving in zip(totals, _of(sums, scale, 1.0), _of(sums, k_tile, v_tile), strict=True):
            leaving[...] = (total * factor).astype(leaving.dtype)
        plgpu.commit_smem()
        for gradient, leaving in zip(gradients, _of(sums, k_tile, v_tile), strict=True):
            plgpu.copy_smem_to_gmem(leaving, gradient.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    in_roles(consume, lambda: _load_query_blocks(gmem, shared, batch, head * group, group, steps))


def _view_of_queries(
    gmem: Operands, extent: Extent, batch: Array, tile_index: Array, warpgroup: Array, block: int
) -> Any:
    """The steps of a tile of keys with this consumer's bare ones, and a function from its rows to their limits."""
    if gmem.spans is not None:
        return read_steps(gmem.spans, batch, tile_index, warpgroup), lambda rows: read_limits(gmem.spans, batch, rows)
    offset, first = gmem.offset[0], tile_index * TILE
    mine = first + warpgroup * ROWS_EACH
    steps = query_steps(extent, first, first + (TILE - 1), offset, block)
    own = query_steps(extent, mine, mine + (ROWS_EACH - 1), offset, block)
    bare_start = jnp.clip(own.bare_start, steps.start, steps.stop)
    bare_stop = jnp.clip(own.bare_stop, bare_start, steps.stop)
    key = mine + row_indices(ROWS_EACH)
    return Steps(steps.start, steps.stop, bare_start, bare_stop), lambda rows: query_limits(extent, key, offset)


def _load_query_blocks(gmem: Operands, shared: Shared, batch: Array, head: Array, group: int, steps: Steps) -> None:
    """The producer: for each query head of the group all query blocks in order, as slots become free."""
    stages, block = shared.q.shape[:2]
    per_head = steps.stop - steps.start
    count = per_head * group

    @pl.loop(jnp.int32(0), count)
    def load(i: Array) -> None:
        slot = lax.rem(i, jnp.int32(stages))
        of_group = lax.div(i, per_head)
        rows = pl.ds((steps.start + i - of_group * per_head) * block, block)
        q_head = head + of_group
        pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, shared.free.at[slot]))
        plgpu.copy_gmem_to_smem(gmem.q.at[batch, rows, q_head], shared.q.at[slot], shared.q_full.at[slot])
        plgpu.copy_gmem_to_smem(gmem.lse.at[batch, q_head, rows], shared.lse.at[slot], shared.q_full.at[slot])
        plgpu.copy_gmem_to_smem(gmem.d_out.at[batch, rows, q_head], shared.d_out.at[slot], shared.d_out_full.at[slot])
        plgpu.copy_gmem_to_smem(gmem.delta.at[batch, q_head, rows], shared.delta.at[slot], shared.d_out_full.at[slot])

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def drain(i: Array) -> None:
        plgpu.barrier_wait(shared.free.at[lax.rem(i, jnp.int32(stages))])


def _walk(consumer: Consumer, steps: Steps, group: int) -> tuple[Array, ...]:
    """For each head near edge masked, interior bare, far edge masked: the sums [rows, H] (unscaled) and [rows, Hv]."""
    low, high = consumer.limits
    shared = consumer.shared
    per_head = steps.stop - steps.start

    def one_head(of_group: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        done = of_group * per_head - steps.start  # block n is step `done + n` of all

        def phase(begin: Array, end: Array, limits: tuple[Array | None, Array | None], carry: tuple) -> tuple:
            return lax.fori_loop(begin, end, functools.partial(_step, consumer, limits, done), carry)

        carry = phase(steps.start, steps.bare_start, (low, high), carry)
        carry = phase(steps.bare_start, steps.bare_stop, (None, None), carry)
        return carry if high is None else phase(steps.bare_stop, steps.stop, (None, high), carry)

    _wait_for_queries(consumer, jnp.int32(0))
    widths = _of(consumer.sums, shared.k.shape[2], shared.v.shape[2])
    start = tuple(zeros(ROWS_EACH, width) for width in widths)
    return lax.fori_loop(jnp.int32(0), jnp.int32(group), one_head, start)


def _wait_for_queries(consumer: Consumer, i: Array) -> None:
    """Until the queries of step i are there, if there is such a step."""
    full = consumer.shared.q_full

    @pl.when(i < consumer.n_steps)
    def wait() -> None:
        plgpu.barrier_wait(full.at[lax.rem(i, jnp.int32(consumer.shared.q.shape[0]))])


def _step(
    consumer: Consumer,
    limits: tuple[Array | None, Array | None],
    done: Array,
    n: Array,
    carry: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Adds what query block n contributes to dk and dv."""
    shared = consumer.shared
    stages, block = shared.q.shape[:2]
    slot = lax.rem(done + n, jnp.int32(stages))
    me = lax.optimization_barrier(consumer.me)  # see the forward kernel

    def weigh(scores: Accumulator, *d_weights: Accumulator) -> tuple[Array, ...]:
        scores.add(shared.k.at[me], shared.q.at[slot].T)
        plgpu.barrier_wait(shared.d_out_full.at[slot])
        for of_weights in d_weights:
            of_weights.add(shared.v.at[me], shared.d_out.at[slot].T)
        lse = plgpu.load(shared.lse.at[slot], layout=COLUMNS)
        s = mask_scores(scores.value(in_flight=len(d_weights)), *limits, n * block)
        weights = jnp.exp2(s * consumer.scale - down(lse, ROWS_EACH))
        _wait_for_queries(consumer, done + n + 1)  # a border before the wait: see the forward kernel
        if not d_weights:
            return (weights.astype(shared.q.dtype),)
        delta = plgpu.load(shared.delta.at[slot], layout=COLUMNS)
        d_scores = weights * (d_weights[0].value(in_flight=0) - down(delta, ROWS_EACH))
        return _of(consumer.sums, d_scores.astype(shared.q.dtype), weights.astype(shared.q.dtype))

    fresh = [(ROWS_EACH, block)] * (1 if consumer.sums == "values" else 2)
    lefts = accumulating(weigh, fresh=fresh, interpreted=consumer.interpreted)

    def products(*totals: Accumulator) -> tuple[Array, ...]:
        for total, left, right in zip(totals, lefts, _of(consumer.sums, shared.q, shared.d_out), strict=True):
            total.add(left, right.at[slot])
        return tuple(total.value(in_flight=0) for total in totals)

    sums = accumulating(products, continued=carry, interpreted=consumer.interpreted)
    plgpu.barrier_arrive(shared.free.at[slot])
    return sums
