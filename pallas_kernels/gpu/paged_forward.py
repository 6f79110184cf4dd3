"""The kernel of paged_attention on Hopper: tiles of packed queries over pages, the keys split into several shares.

A row of a tile is one query head of one token: the heads that share a key head lie in one tile, so every page is loaded
once for all of them. One kernel serves decoding (one consumer of 64 rows) and prompts (two consumers). The pipeline is
that of `flash_forward`.
"""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from .extent import Extent, Steps, key_limits, key_steps
from .flash_forward import LOG2_E, NOTHING_YET, Softmax, mask_scores
from .paged_blocks import (
    BlockMemory,
    Blocks,
    Seen,
    await_keys,
    await_values,
    clear_strangers,
    copies_per_block,
    key_operand,
    load_pages,
    release_keys,
    release_values,
    swizzled,
    value_operand,
)
from .paged_plan import PagedPlan
from .tensor_core import Accumulator, accumulating, across, per_row, row_indices, zeros
from .tiles import ROWS_EACH

ENDLESS = 2**31 - 1  # keys are bounded by the newest query of a tile alone
# Registers per thread of the kernel with two consumers, out of 504 for one thread of each warpgroup.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


class Operands(NamedTuple):
    """Arrays in device memory. Tiles of queries belong to one sequence each; rows are whole multiples of 8."""

    q: Float[Array, "M K rows H"]  # row r: token r // group of the tile, head r % group of the key head
    k: Float[Array, "P page K H"]
    v: Float[Array, "P page K Hv"]
    page_table: Int[Array, "B pages"]
    sequence: Int[Array, "M"]
    first: Int[Array, "M"]  # position of the first token of a tile
    last: Int[Array, "M"]  # position of the last one; less than the first's where the tile is not used
    score_factor: Float[Array, "K"]  # multiplies the scores, times log2(e)
    value_factor: Float[Array, "K"] | None  # multiplies the output


class Shared(NamedTuple):
    """Shared memory and barriers of one tile."""

    q_or_out: Any  # the outputs lie over the queries, which are done with by then
    blocks: BlockMemory
    lse: Any
    q_full: Any
    q_done: Any
    turn: Any  # whose products may be issued; None where every consumer has blocks to itself


class Consumer(NamedTuple):
    """What one consumer needs at every step."""

    shared: Shared
    blocks: Blocks
    me: Array  # which consumer
    steps: Steps
    limits: tuple[Array | None, Array]
    seen: Seen
    scale: Array  # of the scores, times log2(e)
    interpreted: bool

    def start(self, i: Array) -> Array:
        """Position of the first key of step i; steps count from the newest block."""
        return (self.steps.stop - 1 - i) * self.blocks.block


def paged_forward(
    operands: Operands, *, plan: PagedPlan, interpret: Any
) -> tuple[Float[Array, "splits M K rows Hv"], Float[Array, "splits M K rows"]]:
    """Attention of every tile over its share of the keys, and the natural log-sum-exp.

    With one split the output has the dtype of q; with more it is float32, and undefined where the log-sum-exp is -inf.
    """
    (M, K, rows, H), dtype = operands.q.shape, operands.q.dtype
    Hv, page = operands.v.shape[3], operands.k.shape[1]
    out_dtype = dtype if plan.splits == 1 else jnp.float32
    kernel = plgpu.kernel(
        functools.partial(_tile, plan=plan, interpreted=bool(interpret)),
        out_type=(
            jax.ShapeDtypeStruct((plan.splits, M, K, rows, Hv), out_dtype),
            jax.ShapeDtypeStruct((plan.splits, M, K, rows), jnp.float32),
        ),
        grid=(K, M, plan.splits // plan.rings),
        grid_names=("head", "tile", "split"),
        num_threads=plan.consumers + 1,
        thread_name="warpgroup",
        scratch_types=[_shared(plan, H, Hv, page, dtype, operands.k.dtype, out_dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="paged_forward",
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(operands)


def _shared(plan: PagedPlan, H: int, Hv: int, page: int, dtype: Any, pool_dtype: Any, out_dtype: Any) -> Shared:
    slots, block, consumers = plan.rings * plan.stages, plan.block, plan.consumers
    full = plgpu.Barrier(num_barriers=slots, num_arrivals=copies_per_block(block, page))
    free = plgpu.Barrier(num_barriers=slots, num_arrivals=consumers // plan.rings)
    narrow, together = jnp.dtype(pool_dtype).itemsize == 1, plan.rings < consumers
    blocks = BlockMemory(
        k=swizzled((slots, block, H), pool_dtype),
        v=swizzled((slots, block, Hv), pool_dtype),
        k_full=full,
        v_full=full,
        k_free=free,
        v_free=free,
        wide_k=swizzled((plan.rings, block, H), dtype) if narrow else None,
        wide_v=swizzled((plan.rings, block, Hv), dtype) if narrow else None,
        v_clear=plgpu.Barrier(num_arrivals=consumers) if together else None,
    )
    return Shared(
        q_or_out=plgpu.RefUnion(
            swizzled((consumers, ROWS_EACH, H), dtype), swizzled((consumers, ROWS_EACH, Hv), out_dtype)
        ),
        blocks=blocks,
        lse=plgpu.SMEM((consumers, ROWS_EACH), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=consumers),
        q_done=plgpu.Barrier(num_arrivals=consumers),
        turn=plgpu.Barrier(num_barriers=consumers) if together else None,
    )


def _tile(gmem: Operands, out: Any, lse: Any, shared: Shared, *, plan: PagedPlan, interpreted: bool) -> None:
    warpgroup, head = lax.axis_index("warpgroup"), lax.axis_index("head")
    # Later tiles of a prompt see more keys: they start first, so that short ones fill the end.
    index = gmem.q.shape[0] - 1 - lax.axis_index("tile")
    first, last = gmem.first[index], gmem.last[index]
    me = jnp.minimum(warpgroup, plan.consumers - 1)
    # Consumers have either keys of their own, for all rows, or rows of their own, over all keys.
    ring, row_block = (me, jnp.zeros_like(me)) if plan.rings > 1 else (jnp.zeros_like(me), me)
    begin = lax.axis_index("split") * plan.rings
    whole = _steps(plan, first, last, row_block)
    steps = _share(whole, begin + ring, plan.splits)
    used = last >= first
    busy = used & (steps.stop > steps.start)
    any_busy = used & (_share(whole, begin, plan.splits).stop > whole.start)
    rows = pl.ds(row_block * ROWS_EACH, min(ROWS_EACH, gmem.q.shape[2]))
    lse_rows = lse.at[begin + ring, index, head, rows]

    @pl.when(any_busy & (warpgroup < plan.consumers))
    def consume() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

        @pl.when(busy)
        def attend() -> None:
            queries = shared.q_or_out[0].at[me, pl.ds(0, rows.size)]
            plgpu.copy_gmem_to_smem(gmem.q.at[index, head, rows], queries, shared.q_full.at[me])
            oldest, _ = key_limits(_extent(plan), first)
            seen = Seen(jnp.zeros_like(first) if oldest is None else oldest, last)
            limits = _limits(plan, first, last, row_block)
            blocks = Blocks(shared.blocks, ring, plan.stages)
            consumer = Consumer(shared, blocks, me, steps, limits, seen, gmem.score_factor[head], interpreted)
            acc, softmax = _attend(consumer)
            factor = None if gmem.value_factor is None else gmem.value_factor[head]
            _store(consumer, acc, softmax, factor, out.at[begin + ring, index, head, rows], lse_rows)

        if plan.rings > 1:
            pl.when(~busy)(functools.partial(plgpu.barrier_arrive, shared.q_done))

    @pl.when(any_busy & (warpgroup == plan.consumers))
    def produce() -> None:
        if plan.consumers > 1:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        rings = [jnp.int32(r) for r in range(plan.rings)]
        loads = [(Blocks(shared.blocks, r, plan.stages), _share(whole, begin + r, plan.splits)) for r in rings]
        load_pages(loads, gmem.k, gmem.v, gmem.page_table.at[gmem.sequence[index]], head)

    if plan.splits > 1:

        @pl.when(~busy & (warpgroup < plan.consumers))
        def leave_nothing() -> None:
            mine = shared.lse.at[me]
            mine[...] = per_row(-math.inf, ROWS_EACH)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine.at[pl.ds(0, rows.size)], lse_rows)
            plgpu.wait_smem_to_gmem(0)


def _extent(plan: PagedPlan) -> Extent:
    return Extent(plan.window, ENDLESS, ENDLESS)


def _steps(plan: PagedPlan, first: Array, last: Array, consumer: Array) -> Steps:
    """The key blocks of a tile, at least one, and which of them need no mask for a consumer."""
    extent, begin = _extent(plan), consumer * ROWS_EACH
    mine_first = jnp.minimum(first + lax.div(begin, jnp.int32(plan.group)), last)
    mine_last = jnp.minimum(first + lax.div(begin + (ROWS_EACH - 1), jnp.int32(plan.group)), last)
    steps = key_steps(extent, first, last, plan.block)
    own = key_steps(extent, mine_first, mine_last, plan.block)
    bare_stop = jnp.clip(own.bare_stop, steps.start, steps.stop)
    return Steps(steps.start, steps.stop, jnp.clip(own.bare_start, steps.start, bare_stop), bare_stop)


def _share(steps: Steps, split: Array, splits: int) -> Steps:
    """The split's equal part of the blocks, the first split having the newest; the last splits may have none."""
    if splits == 1:
        return steps
    share = lax.div(steps.stop - steps.start + (splits - 1), jnp.int32(splits))
    stop = jnp.maximum(steps.stop - split * share, steps.start)
    start = jnp.maximum(stop - share, steps.start)
    bare_stop = jnp.clip(steps.bare_stop, start, stop)
    return Steps(start, stop, jnp.clip(steps.bare_start, start, bare_stop), bare_stop)


def _limits(plan: PagedPlan, first: Array, last: Array, consumer: Array) -> tuple[Array | None, Array]:
    """The visible interval of each of a consumer's rows."""
    token = lax.div(consumer * ROWS_EACH + row_indices(ROWS_EACH), jnp.int32(plan.group))
    low, _ = key_limits(_extent(plan), first + token)
    return low, jnp.minimum(first + token, last)


def _advance(consumer: Consumer, scores: Array, top: Array, total: Array) -> tuple[Softmax, Array]:
    """The softmax with one more block of scores, and what the sums before it must be multiplied with."""
    new_top = jnp.maximum(top, scores.max(axis=1) * consumer.scale)
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * consumer.scale - across(new_top, scores.shape[1]))
    return Softmax(new_top, total * decay + weights.sum(axis=1), weights), decay


def _take_turn(consumer: Consumer) -> None:
    if consumer.shared.turn is not None:
        plgpu.barrier_wait(consumer.shared.turn.at[consumer.me])


def _pass_turn(consumer: Consumer) -> None:
    if consumer.shared.turn is not None:
        plgpu.barrier_arrive(consumer.shared.turn.at[1 - consumer.me])


def _attend(consumer: Consumer) -> tuple[Array, Softmax]:
    """Right edge masked, interior bare, left edge masked: the weighted sum of values [rows, Hv] and its softmax."""
    steps, count = consumer.steps, consumer.steps.stop - consumer.steps.start
    low, high = consumer.limits
    right = jnp.maximum(steps.stop - steps.bare_stop, 1)  # steps count from the newest block
    bare = jnp.maximum(steps.stop - steps.bare_start, 1)
    carry = _first_step(consumer)
    carry = lax.fori_loop(jnp.int32(1), right, functools.partial(_step, consumer, (low, high)), carry)
    carry = lax.fori_loop(right, bare, functools.partial(_step, consumer, (None, None)), carry)
    if low is not None:
        carry = lax.fori_loop(bare, count, functools.partial(_step, consumer, (low, None)), carry)
    return _last_product(consumer, *carry)


def _first_step(consumer: Consumer) -> tuple[Array, Softmax]:
    shared, me, blocks = consumer.shared, consumer.me, consumer.blocks
    zero = jnp.int32(0)
    if shared.turn is not None:
        pl.when(me == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))

    def product(scores: Accumulator) -> Array:
        scores.add(shared.q_or_out[0].at[me], key_operand(blocks, zero).T)
        _pass_turn(consumer)
        return scores.value(0)

    plgpu.barrier_wait(shared.q_full.at[me])
    await_keys(blocks, zero)
    _take_turn(consumer)
    scores = accumulating(product, fresh=[(ROWS_EACH, blocks.block)], interpreted=consumer.interpreted)
    release_keys(blocks, zero)
    _await_next_keys(consumer, jnp.int32(1))
    scores = mask_scores(scores, *consumer.limits, consumer.start(zero))
    softmax, _ = _advance(consumer, scores, per_row(NOTHING_YET, ROWS_EACH), per_row(0.0, ROWS_EACH))
    await_values(blocks, zero)
    clear_strangers(blocks, zero, consumer.start(zero), consumer.seen, me)
    Hv = shared.blocks.v.shape[2]
    return zeros(ROWS_EACH, Hv), softmax._replace(weights=softmax.weights.astype(shared.q_or_out[0].dtype))


def _step(consumer: Consumer, limits: tuple[Array | None, Array | None], i: Array, carry: tuple) -> tuple:
    """Scores of step i over values of step i - 1; see `flash_forward` for the order of waits."""
    shared, blocks = consumer.shared, consumer.blocks
    acc, softmax = carry

    def products(scores: Accumulator, mixed: Accumulator) -> tuple[Array, Softmax]:
        scores.add(shared.q_or_out[0].at[lax.optimization_barrier(consumer.me)], key_operand(blocks, i).T)
        mixed.add(softmax.weights, value_operand(blocks, i - 1))
        _pass_turn(consumer)
        s = scores.value(in_flight=1)
        release_keys(blocks, i)
        s = mask_scores(s, *limits, consumer.start(i))
        new, decay = _advance(consumer, s, softmax.top, softmax.total)
        _await_next_keys(consumer, i + 1)
        acc = mixed.value(in_flight=0)
        release_values(blocks, i - 1)
        return acc * across(decay, acc.shape[1]), new._replace(weights=new.weights.astype(softmax.weights.dtype))

    _take_turn(consumer)
    carry = accumulating(products, fresh=[(ROWS_EACH, blocks.block)], continued=[acc], interpreted=consumer.interpreted)
    await_values(blocks, i)
    return carry


def _await_next_keys(consumer: Consumer, i: Array) -> None:
    """Until the keys of step i are there, if there is such a step."""
    there = i < consumer.steps.stop - consumer.steps.start
    pl.when(there)(lambda: await_keys(consumer.blocks, i))


def _last_product(consumer: Consumer, acc: Array, softmax: Softmax) -> tuple[Array, Softmax]:
    shared, me, blocks = consumer.shared, consumer.me, consumer.blocks
    last = consumer.steps.stop - consumer.steps.start - 1
    plgpu.barrier_arrive(shared.q_done)
    if consumer.limits[0] is not None:
        start = consumer.start(last)
        pl.when(last > 0)(lambda: clear_strangers(blocks, last, start, consumer.seen, me))

    def product(mixed: Accumulator) -> Array:
        mixed.add(softmax.weights, value_operand(blocks, last))
        _pass_turn(consumer)
        return mixed.value(in_flight=0)

    _take_turn(consumer)
    acc = accumulating(product, continued=[acc], interpreted=consumer.interpreted)
    release_values(blocks, last)
    if shared.turn is not None:
        pl.when(me == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))
    return acc, softmax


def _store(consumer: Consumer, acc: Array, softmax: Softmax, factor: Array | None, out: Any, lse: Any) -> None:
    """Rows that saw nothing have a total of zero: they give zeros and -inf."""
    shared, me = consumer.shared, consumer.me
    out_tile, lse_tile = shared.q_or_out[1].at[me], shared.lse.at[me]
    seen = softmax.total > 0
    total = jnp.where(seen, softmax.total, 1.0)
    weight = 1.0 / total if factor is None else factor / total
    plgpu.barrier_wait(shared.q_done)
    out_tile[...] = (acc * across(weight, acc.shape[1])).astype(out_tile.dtype)
    lse_tile[...] = jnp.where(seen, softmax.top / LOG2_E + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    rows = pl.ds(0, lse.shape[0])
    plgpu.copy_smem_to_gmem(out_tile.at[rows], out)
    plgpu.copy_smem_to_gmem(lse_tile.at[rows], lse)
    plgpu.wait_smem_to_gmem(0)
