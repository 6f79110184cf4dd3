"""What the Hopper kernels visit, and whether the interpreter's race detector would see a broken pipeline."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]

BLOCK, TILE, WIDTH = 64, 128, 64


class Call(NamedTuple):
    """Lengths that are whole tiles, the window, and where the first query stands."""

    T: int
    S: int
    window: int | None
    offset: int


def operands(call: Call) -> tuple[jax.Array, ...]:
    """q, k, v and the output's gradient, one head."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(1, n, 1, WIDTH)), jnp.bfloat16) for n in (call.T, call.S, call.S, call.T))


def settings(call: Call) -> dict[str, Any]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu.extent import Extent

    interpret = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]
    extent = Extent(call.window, call.T, call.S)
    return {"extent": extent, "scale": 0.125, "block": BLOCK, "stages": 3, "interpret": interpret}


def visited(call: Call, kernel: str) -> np.ndarray:
    """[tiles, blocks]: whether a tile's result turns NaN when one block of the other side is poisoned.

    A block that is loaded and multiplied spreads its NaN even where every weight is 0; a block that is skipped cannot.
    Poisoned block b is batch entry b, so one call finds all visits.
    """
    from pallas_kernels.gpu import flash_backward_key, flash_backward_query, flash_forward

    rows = call.T if kernel == "dk, dv" else call.S
    blocks = rows // BLOCK
    here = jnp.arange(rows)[None] // BLOCK == jnp.arange(blocks)[:, None]
    poison = jnp.where(here, jnp.nan, 1.0).astype(jnp.bfloat16)[..., None, None]
    q, k, v, d_out = (jnp.repeat(x, blocks, axis=0) for x in operands(call))
    offset = jnp.asarray([call.offset], jnp.int32)
    ones = jnp.ones((blocks, 1, call.T), jnp.float32)
    backward = flash_backward_query.Operands(q, k, v, d_out, 30 * ones, ones, offset, None)
    if kernel == "forward":
        result, _ = flash_forward.flash_forward(
            flash_forward.Operands(q, k, v * poison, offset, None), **settings(call)
        )
    elif kernel == "dq":
        result = flash_backward_query.flash_backward_query(backward._replace(k=k * poison), **settings(call))
    else:
        _, result = flash_backward_key.flash_backward_key(backward._replace(d_out=d_out * poison), **settings(call))
    return np.asarray(jnp.isnan(result).reshape(blocks, -1, TILE * WIDTH).any(axis=2).T)


def visible_blocks(call: Call, kernel: str) -> np.ndarray:
    """[tiles, blocks] that hold any visible pair, from the definition of visibility alone."""
    distance = call.offset + np.arange(call.T)[:, None] - np.arange(call.S)[None]
    seen = (distance >= 0) & (distance < (call.window or call.S + call.T))
    if kernel == "dk, dv":
        seen = seen.T
    return seen.reshape(seen.shape[0] // TILE, TILE, seen.shape[1] // BLOCK, BLOCK).any(axis=(1, 3))


@pytest.mark.parametrize("kernel", ["forward", "dq", "dk, dv"])
@pytest.mark.parametrize("call", [Call(256, 256, 40, 0), Call(128, 256, None, 100)], ids=str)
def test_exactly_the_blocks_that_hold_a_visible_pair_are_visited(call: Call, kernel: str) -> None:
    np.testing.assert_array_equal(visited(call, kernel), visible_blocks(call, kernel))


def caught() -> bool:
    """Whether running the forward kernel shows a race, a barrier that ends out of step, or a wrong result."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    from pallas_kernels.gpu.flash_forward import Operands, flash_forward
    from pallas_kernels.reference import flash_attention_reference

    call = Call(128, 256, 200, 128)
    q, k, v, _ = operands(call)
    reference, _ = flash_attention_reference(
        q, k, v, window=call.window, query_segments=None, key_segments=None, query_offset=call.offset, scale=0.125
    )
    try:
        out, _ = flash_forward(Operands(q, k, v, jnp.asarray([call.offset], jnp.int32), None), **settings(call))
        out = jax.block_until_ready(out)
    except Exception as error:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "arrier" not in str(error):
            raise
        return True
    wrong = not np.allclose(out.astype(jnp.float32), reference.astype(jnp.float32), atol=0.03)
    return interpret_pallas_call.get_races().races_found or wrong


@pytest.mark.parametrize(
    "bug", ["none", "keys used before they arrived", "values used before they arrived", "early release"]
)
def test_a_planted_pipeline_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax import lax
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import flash_forward

    wait, step = plgpu.barrier_wait, flash_forward._step

    def broken_step(consumer: Any, limits: Any, i: Any, carry: Any) -> Any:
        shared = consumer.shared
        slot = lax.rem(i, jnp.int32(shared.k.shape[0]))
        if bug == "early release":
            plgpu.barrier_arrive(shared.v_free.at[slot])
            return step(consumer, limits, i, carry)
        skipped = shared.k_full if bug.startswith("keys") else shared.v_full
        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "barrier_wait", lambda ref: None if ref.ref is skipped else wait(ref))
            return step(consumer, limits, i, carry)

    if bug != "none":
        monkeypatch.setattr(flash_forward, "_step", broken_step)
    assert caught() == (bug != "none")
