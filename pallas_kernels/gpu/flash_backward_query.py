"""The dQ kernel of flash_attention on Hopper: a tile of 128 query rows walks over the key blocks that it sees.

Probabilities are recomputed from the log-sum-exp (FlashAttention-2, Dao 2023, arXiv 2307.08691). The gradient of step
i - 1 is multiplied while the scores of step i are.
"""
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

from .extent import Extent, Steps
from .flash_forward import LOG2_E, mask_scores, view_of_keys
from .launch import in_roles, key_barriers, launch, load_key_blocks
from .spans import Spans
from .tensor_core import ROWS, Accumulator, accumulating, across, tile, zeros
from .tiles import CONSUMERS, ROWS_EACH, TILE


class Operands(NamedTuple):
    """Arrays in device memory. Row counts are whole tiles and blocks."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    d_out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]  # in base 2, large and positive for rows that see nothing
    delta: Float[Array, "B N T"]
    offset: Int[Array, "1"]
    spans: Spans | None


class Shared(NamedTuple):
    """Shared memory and barriers of one tile."""

    q: Any  # dq leaves from here
    d_out: Any
    k: Any
    v: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


class Consumer(NamedTuple):
    """What one consumer needs at every step."""

    shared: Shared
    me: Array  # which consumer
    steps: Steps
    limits: tuple[Array | None, Array]
    lse: Array  # [rows]
    delta: Array  # [rows]
    scale: float  # of the scores, times log2(e)
    interpreted: bool


def flash_backward_query(
    operands: Operands, *, extent: Extent, scale: float, block: int, stages: int, interpret: Any
) -> Float[Array, "B T N H"]:
    """The gradient of the queries.

    Needs at least three stages: the keys of the next step are awaited before those of the last one are given back.
    """
    if stages < 3:
        raise ValueError(f"stages={stages}: the dQ kernel needs at least 3")
    (B, T, N, H), dtype = operands.q.shape, operands.q.dtype
    Hv = operands.v.shape[3]
    shared = Shared(
        q=tile((CONSUMERS, ROWS_EACH, H), dtype, block),
        d_out=tile((CONSUMERS, ROWS_EACH, Hv), dtype, block),
        k=tile((stages, block, H), dtype, block),
        v=tile((stages, block, Hv), dtype, block),
        q_full=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        **key_barriers(stages),
    )
    return launch(
        functools.partial(_tile, extent=extent, scale=scale, block=block, interpreted=bool(interpret)),
        "flash_backward_query",
        operands,
        shared,
        jax.ShapeDtypeStruct((B, T, N, H), dtype),
        (N, T // TILE, B),
        interpret,
    )


def _tile(
    gmem: Operands, dq: Any, shared: Shared, *, extent: Extent, scale: float, block: int, interpreted: bool
) -> None:
    warpgroup, batch = lax.axis_index("warpgroup"), lax.axis_index("batch")
    tile_index = gmem.q.shape[1] // TILE - 1 - lax.axis_index("tile")  # longest first, as in the forward kernel
    steps, limits_of = view_of_keys(gmem, extent, batch, tile_index, warpgroup, block)

    def consume() -> None:
        head = lax.axis_index("head")
        rows = pl.ds(tile_index * TILE + warpgroup * ROWS_EACH, ROWS_EACH)
        arrived = shared.q_full.at[warpgroup]
        plgpu.copy_gmem_to_smem(gmem.q.at[batch, rows, head], shared.q.at[warpgroup], arrived)
        plgpu.copy_gmem_to_smem(gmem.d_out.at[batch, rows, head], shared.d_out.at[warpgroup], arrived)
        lse = plgpu.load(gmem.lse.at[batch, head, rows], layout=ROWS, optimized=False)
        delta = plgpu.load(gmem.delta.at[batch, head, rows], layout=ROWS, optimized=False)
        plgpu.barrier_wait(arrived)
        consumer = Consumer(shared, warpgroup, steps, limits_of(rows), lse, delta, scale * LOG2_E, interpreted)
        acc = _walk(consumer)
        shared.q[warpgroup] = (acc * scale).astype(shared.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.q.at[warpgroup], dq.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    in_roles(consume, lambda: load_key_blocks(gmem, shared, batch, steps))


def _walk(consumer: Consumer) -> Array:
    """Right edge masked, interior bare, left edge masked: the unscaled gradient [rows, H]."""
    steps, count = consumer.steps, consumer.steps.stop - consumer.steps.start
    low, high = consumer.limits
    shared = consumer.shared
    right = jnp.maximum(steps.stop - steps.bare_stop, 1)  # steps count from the newest block
    bare = jnp.maximum(steps.stop - steps.bare_start, 1)
    _wait_for(consumer, shared.k_full, jnp.int32(0))
    _wait_for(consumer, shared.v_full, jnp.int32(0))
    carry = _step(consumer, (low, high), jnp.int32(0), None)
    carry = lax.fori_loop(jnp.int32(1), right, functools.partial(_step, consumer, (low, high)), carry)
    carry = lax.fori_loop(right, bare, functools.partial(_step, consumer, (None, None)), carry)
    if low is not None:
        carry = lax.fori_loop(bare, count, functools.partial(_step, consumer, (low, None)), carry)
    acc, d_scores = carry
    last = lax.rem(count - 1, jnp.int32(shared.k.shape[0]))

    def product(gradient: Accumulator) -> Array:
        gradient.add(d_scores, shared.k.at[last])
        return gradient.value(in_flight=0)

    acc = accumulating(product, continued=[acc], interpreted=consumer.interpreted)
    plgpu.barrier_arrive(shared.k_free.at[last])
    return acc


def _wait_for(consumer: Consumer, full: Any, i: Array) -> None:
    """Until the block of step i is there, if there is such a step."""

    @pl.when(i < consumer.steps.stop - consumer.steps.start)
    def wait() -> None:
        plgpu.barrier_wait(full.at[lax.rem(i, jnp.int32(consumer.shared.k.shape[0]))])


def _step(
    consumer: Consumer, limits: tuple[Array | None, Array | None], i: Array, carry: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """Gradient of the scores of step i, while that of step i - 1 is multiplied with its keys."""
    shared, me = consumer.shared, consumer.me
    stages, block, H = shared.k.shape
    slot, before = lax.rem(i, jnp.int32(stages)), lax.rem(i + (stages - 1), jnp.int32(stages))

    def products(scores: Accumulator, d_weights: Accumulator, *gradient: Accumulator) -> tuple[Array, Array]:
        # The barrier keeps the compiler from holding one precomputed descriptor per piece of q in registers.
        own = lax.optimization_barrier(me)
        scores.add(shared.q.at[own], shared.k.at[slot].T)
        d_weights.add(shared.d_out.at[own], shared.v.at[slot].T)
        if carry is not None:
            gradient[0].add(carry[1], shared.k.at[before])
        s = mask_scores(scores.value(len(gradient) + 1), *limits, (consumer.steps.stop - 1 - i) * block)
        weights = jnp.exp2(s * consumer.scale - across(consumer.lse, block))
        _wait_for(consumer, shared.v_full, i + 1)  # a border before each wait: see the forward kernel
        d_scores = weights * (d_weights.value(len(gradient)) - across(consumer.delta, block))
        plgpu.barrier_arrive(shared.v_free.at[slot])
        _wait_for(consumer, shared.k_full, i + 1)
        if carry is None:
            return zeros(ROWS_EACH, H), d_scores.astype(shared.k.dtype)
        acc = gradient[0].value(in_flight=0)
        plgpu.barrier_arrive(shared.k_free.at[before])
        # Rounded after the wait: see the forward kernel.
        return acc, d_scores.astype(shared.k.dtype)

    fresh = [(ROWS_EACH, block), (ROWS_EACH, block)]
    continued = [] if carry is None else [carry[0]]
    return accumulating(products, fresh=fresh, continued=continued, interpreted=consumer.interpreted)
