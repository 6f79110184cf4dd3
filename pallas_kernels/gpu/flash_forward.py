"""The forward kernel of flash_attention on Hopper: one producer warpgroup, two consumers of 64 query rows each.

The pipeline is that of FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608): scores of the next key block are issued
before the values of this one, so that the softmax runs while the tensor cores multiply; the two consumers take turns.
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
from .launch import in_roles, key_barriers, launch, load_key_blocks
from .spans import Spans, read_limits, read_steps
from .tensor_core import Accumulator, accumulating, across, columns_within, per_row, row_indices, tile, zeros
from .tiles import CONSUMERS, ROWS_EACH, TILE

LOG2_E = math.log2(math.e)
# Finite, so that differences stay numbers, and below every score that products of 16-bit numbers can reach in practice.
NOTHING_YET = -1e30


class Operands(NamedTuple):
    """Arrays in device memory. Row counts are whole tiles and blocks."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    offset: Int[Array, "1"]
    spans: Spans | None


class Shared(NamedTuple):
    """Shared memory and barriers of one tile."""

    q_or_out: Any  # the outputs lie over the queries, which are done with by then
    k: Any
    v: Any
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any  # whose products may be issued
    q_done: Any


class Softmax(NamedTuple):
    """The running softmax of 64 rows, in base 2."""

    top: Array  # [rows] largest scaled score so far
    total: Array  # [rows] sum of the weights so far
    weights: Array  # [rows, block] of the last block


class Consumer(NamedTuple):
    """What one consumer needs at every step."""

    shared: Shared
    me: Array  # which consumer
    steps: Steps
    limits: tuple[Array | None, Array]
    scale: float  # of the scores, times log2(e)
    interpreted: bool


def flash_forward(
    operands: Operands, *, extent: Extent, scale: float, block: int, stages: int, interpret: Any
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention and its natural log-sum-exp over padded arrays: T whole tiles of queries, S whole blocks of keys."""
    (B, T, N, H), dtype = operands.q.shape, operands.q.dtype
    Hv = operands.v.shape[3]
    shared = Shared(
        q_or_out=plgpu.RefUnion(tile((CONSUMERS, ROWS_EACH, H), dtype), tile((CONSUMERS, ROWS_EACH, Hv), dtype)),
        k=tile((stages, block, H), dtype),
        v=tile((stages, block, Hv), dtype),
        lse=plgpu.SMEM((CONSUMERS, ROWS_EACH), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=CONSUMERS),
        **key_barriers(stages),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
        q_done=plgpu.Barrier(num_arrivals=CONSUMERS),
    )
    return launch(
        functools.partial(_tile, extent=extent, scale=scale * LOG2_E, block=block, interpreted=bool(interpret)),
        "flash_forward",
        operands,
        shared,
        (jax.ShapeDtypeStruct((B, T, N, Hv), dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
        (N, T // TILE, B),
        interpret,
    )


def _tile(
    gmem: Operands, out: Any, lse: Any, shared: Shared, *, extent: Extent, scale: float, block: int, interpreted: bool
) -> None:
    warpgroup, batch = lax.axis_index("warpgroup"), lax.axis_index("batch")
    # Later tiles see more keys where there is no window: they start first, so that short ones fill the end.
    tile_index = gmem.q.shape[1] // TILE - 1 - lax.axis_index("tile")
    steps, limits_of = view_of_keys(gmem, extent, batch, tile_index, warpgroup, block)

    def consume() -> None:
        head = lax.axis_index("head")
        rows = pl.ds(tile_index * TILE + warpgroup * ROWS_EACH, ROWS_EACH)
        plgpu.copy_gmem_to_smem(
            gmem.q.at[batch, rows, head], shared.q_or_out[0].at[warpgroup], shared.q_full.at[warpgroup]
        )
        consumer = Consumer(shared, warpgroup, steps, limits_of(rows), scale, interpreted)
        acc, softmax = _attend(consumer)
        _store(consumer, acc, softmax, out.at[batch, rows, head], lse.at[batch, head, rows])

    in_roles(consume, lambda: load_key_blocks(gmem, shared, batch, steps))


def view_of_keys(gmem: Any, extent: Extent, batch: Array, tile_index: Array, warpgroup: Array, block: int) -> Any:
    """The steps of a tile of queries with this consumer's bare ones, and a function from its rows to their limits."""
    if gmem.spans is not None:
        return read_steps(gmem.spans, batch, tile_index, warpgroup), lambda rows: read_limits(gmem.spans, batch, rows)
    first = gmem.offset[0] + tile_index * TILE
    mine = first + warpgroup * ROWS_EACH
    steps = key_steps(extent, first, first + (TILE - 1), block)
    own = key_steps(extent, mine, mine + (ROWS_EACH - 1), block)
    bare_stop = jnp.clip(own.bare_stop, steps.start, steps.stop)
    bare_start = jnp.clip(own.bare_start, steps.start, bare_stop)
    position = mine + row_indices(ROWS_EACH)
    return Steps(steps.start, steps.stop, bare_start, bare_stop), lambda rows: key_limits(extent, position)


def mask_scores(scores: Array, low: Array | None, high: Array | None, start: Array) -> Array:
    """-inf where column `start + j` is outside `low .. high` of its row; a limit that is None does not bind."""
    if low is None and high is None:
        return scores
    low, high = None if low is None else low - start, None if high is None else high - start
    return jnp.where(columns_within(low, high, scores.shape[1]), scores, -jnp.inf)


def _advance(consumer: Consumer, scores: Array, top: Array, total: Array) -> tuple[Softmax, Array]:
    """The softmax with one more block of scores, and what the sums before it must be multiplied with."""
    new_top = jnp.maximum(top, scores.max(axis=1) * consumer.scale)
    decay = jnp.exp2(top - new_top)
    weights = jnp.exp2(scores * consumer.scale - across(new_top, scores.shape[1]))
    return Softmax(new_top, total * decay + weights.sum(axis=1), weights), decay


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
    shared, me = consumer.shared, consumer.me
    block, Hv = shared.v.shape[1:]

    @pl.when(me == 1)
    def open_the_first_turn() -> None:
        plgpu.barrier_arrive(shared.turn.at[0])

    def product(scores: Accumulator) -> Array:
        scores.add(shared.q_or_out[0].at[me], shared.k.at[0].T)
        plgpu.barrier_arrive(shared.turn.at[1 - me])
        return scores.value(0)

    for barrier in (shared.q_full.at[me], shared.k_full.at[0], shared.turn.at[me]):
        plgpu.barrier_wait(barrier)
    scores = accumulating(product, fresh=[(ROWS_EACH, block)], interpreted=consumer.interpreted)
    plgpu.barrier_arrive(shared.k_free.at[0])
    _wait_for_keys(consumer, jnp.int32(1))
    scores = mask_scores(scores, *consumer.limits, (consumer.steps.stop - 1) * block)
    softmax, _ = _advance(consumer, scores, per_row(NOTHING_YET, ROWS_EACH), per_row(0.0, ROWS_EACH))
    return zeros(ROWS_EACH, Hv), softmax._replace(weights=softmax.weights.astype(shared.v.dtype))


def _step(consumer: Consumer, limits: tuple[Array | None, Array | None], i: Array, carry: tuple) -> tuple:
    """Scores of step i over values of step i - 1."""
    shared, me = consumer.shared, consumer.me
    acc, softmax = carry
    stages, block, Hv = shared.v.shape
    slot, before = lax.rem(i, jnp.int32(stages)), lax.rem(i - 1, jnp.int32(stages))

    def products(scores: Accumulator, mixed: Accumulator) -> tuple[Array, Softmax]:
        # The barrier keeps the compiler from holding one precomputed descriptor per piece of q in registers.
        scores.add(shared.q_or_out[0].at[lax.optimization_barrier(me)], shared.k.at[slot].T)
        mixed.add(softmax.weights, shared.v.at[before])
        plgpu.barrier_arrive(shared.turn.at[1 - me])
        s = scores.value(in_flight=1)
        plgpu.barrier_arrive(shared.k_free.at[slot])
        s = mask_scores(s, *limits, (consumer.steps.stop - 1 - i) * block)
        new, decay = _advance(consumer, s, softmax.top, softmax.total)
        # Waiting here for the next keys, rather than in the next step, is a border in the code that keeps the assembler
        # from moving the wait below above the softmax, which would end the overlap.
        _wait_for_keys(consumer, i + 1)
        acc = mixed.value(in_flight=0)
        plgpu.barrier_arrive(shared.v_free.at[before])
        # Rounded only now: before, the register of the old weights is still being read by the tensor cores, and the
        # assembler would give up the overlap (its warning C7513).
        return acc * across(decay, Hv), new._replace(weights=new.weights.astype(shared.v.dtype))

    plgpu.barrier_wait(shared.v_full.at[before])
    plgpu.barrier_wait(shared.turn.at[me])
    return accumulating(products, fresh=[(ROWS_EACH, block)], continued=[acc], interpreted=consumer.interpreted)


def _wait_for_keys(consumer: Consumer, i: Array) -> None:
    """Until the keys of step i are there, if there is such a step."""
    full = consumer.shared.k_full

    @pl.when(i < consumer.steps.stop - consumer.steps.start)
    def wait() -> None:
        plgpu.barrier_wait(full.at[lax.rem(i, jnp.int32(consumer.shared.k.shape[0]))])


def _last_product(consumer: Consumer, acc: Array, softmax: Softmax) -> tuple[Array, Softmax]:
    shared, me = consumer.shared, consumer.me
    last = lax.rem(consumer.steps.stop - consumer.steps.start - 1, jnp.int32(shared.v.shape[0]))
    plgpu.barrier_arrive(shared.q_done)

    def product(mixed: Accumulator) -> Array:
        mixed.add(softmax.weights, shared.v.at[last])
        plgpu.barrier_arrive(shared.turn.at[1 - me])
        return mixed.value(in_flight=0)

    plgpu.barrier_wait(shared.v_full.at[last])
    plgpu.barrier_wait(shared.turn.at[me])
    acc = accumulating(product, continued=[acc], interpreted=consumer.interpreted)
    plgpu.barrier_arrive(shared.v_free.at[last])

    @pl.when(me == 0)
    def close_the_last_turn() -> None:
        plgpu.barrier_wait(shared.turn.at[0])

    return acc, softmax


def _store(consumer: Consumer, acc: Array, softmax: Softmax, out: Any, lse: Any) -> None:
    """Rows that saw nothing have a total of zero: they give zeros and -inf."""
    shared, me = consumer.shared, consumer.me
    out_tile, lse_tile = shared.q_or_out[1].at[me], shared.lse.at[me]
    seen = softmax.total > 0
    total = jnp.where(seen, softmax.total, 1.0)
    plgpu.barrier_wait(shared.q_done)
    out_tile[...] = (acc * across(1.0 / total, acc.shape[1])).astype(out_tile.dtype)
    lse_tile[...] = jnp.where(seen, softmax.top / LOG2_E + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile, out)
    plgpu.copy_smem_to_gmem(lse_tile, lse)
    plgpu.wait_smem_to_gmem(0)
