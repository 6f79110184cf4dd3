"""How the Hopper flash kernels are launched: grid, the roles of the three warpgroups, and who loads key blocks."""
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .extent import Steps
from .tiles import CONSUMERS

# Registers per thread, out of 504 for one thread of each warpgroup: loading needs few.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def launch(
    body: Callable[..., None],
    name: str,
    operands: Any,
    shared: Any,
    out_type: Any,
    grid: tuple[int, int, int],
    interpret: Any,
) -> Any:
    """Runs `body(operands, *outputs, shared)` in three warpgroups at every (head, tile, batch) of the grid."""
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[shared],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
        **({"interpret": interpret} if interpret else {}),
    )
    return kernel(operands)


def in_roles(consume: Callable[[], None], produce: Callable[[], None]) -> None:
    """Two warpgroups multiply and a third one loads, each with its share of the registers."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def consumer() -> None:
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consume()

    @pl.when(warpgroup == CONSUMERS)
    def producer() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        produce()


def key_barriers(stages: int) -> dict[str, Any]:
    """Per slot of the rings of keys and values: that it is full, and that both consumers are done with it."""
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS)
    return {"k_full": full, "v_full": full, "k_free": free, "v_free": free}


def load_key_blocks(gmem: Any, shared: Any, batch: Array, steps: Steps) -> None:
    """The producer: key and value blocks of all steps from the newest to the oldest, as slots become free."""
    stages, block = shared.k.shape[:2]
    count = steps.stop - steps.start
    head = lax.div(lax.axis_index("head"), jnp.int32(gmem.q.shape[2] // gmem.k.shape[2]))
    keys, values = gmem.k.at[batch, :, head], gmem.v.at[batch, :, head]

    @pl.loop(jnp.int32(0), count)
    def load(i: Array) -> None:
        slot = lax.rem(i, jnp.int32(stages))
        rows = pl.ds((steps.stop - 1 - i) * block, block)
        for source, target, full, free in (
            (keys, shared.k, shared.k_full, shared.k_free),
            (values, shared.v, shared.v_full, shared.v_free),
        ):
            pl.when(i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot], full.at[slot])

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def drain(i: Array) -> None:
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(shared.k_free.at[slot])
        plgpu.barrier_wait(shared.v_free.at[slot])
