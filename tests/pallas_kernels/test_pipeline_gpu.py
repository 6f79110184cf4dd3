"""What the Hopper kernels visit, and whether the interpreter's race detector would see a broken pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]

BLOCK, TILE, WIDTH, STAGES = 64, 128, 64, 3


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
    return {"extent": extent, "scale": 0.125, "block": BLOCK, "stages": STAGES, "interpret": interpret}


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


def run_kernel(kernel: str, call: Call) -> tuple[Any, Any]:
    """What the kernel computes, and what it should: the output, dq, or dk and dv stacked."""
    from pallas_kernels.gpu import flash_backward_key, flash_backward_query, flash_forward
    from pallas_kernels.reference import flash_attention_reference

    q, k, v, d_out = operands(call)
    options = {"query_segments": None, "key_segments": None, "query_offset": call.offset, "scale": 0.125}
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda *a: flash_attention_reference(*a, window=call.window, **options), *wide)
    dq, dk, dv = pull((d_out.astype(jnp.float32), jnp.zeros_like(lse)))
    offset = jnp.asarray([call.offset], jnp.int32)
    if kernel == "forward":
        return flash_forward.flash_forward(flash_forward.Operands(q, k, v, offset, None), **settings(call))[0], out
    rows = lse.swapaxes(1, 2) * np.log2(np.e), (d_out * out).sum(axis=-1).swapaxes(1, 2)
    backward = flash_backward_query.Operands(q, k, v, d_out, *rows, offset, None)
    if kernel == "dq":
        return flash_backward_query.flash_backward_query(backward, **settings(call)), dq
    return jnp.stack(flash_backward_key.flash_backward_key(backward, **settings(call))), jnp.stack([dk, dv])


def caught(kernel: str) -> bool:
    """Whether running the kernel shows a race, a barrier that ends out of step, or a wrong result."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    try:
        got, wanted = run_kernel(kernel, Call(128, 256, 200, 128))
        got = jax.block_until_ready(got)
    except Exception as error:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "arrier" not in str(error):
            raise
        return True
    wrong = not np.allclose(got.astype(jnp.float32), wanted, atol=0.05)
    return interpret_pallas_call.get_races().races_found or wrong


def without_waiting_for(name: str) -> Callable[..., Any]:
    """A kernel's step that takes the blocks behind these barriers to be there already."""

    def broken(real: Callable[..., Any], consumer: Any, *args: Any) -> Any:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        wait, skipped = plgpu.barrier_wait, getattr(consumer.shared, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plgpu, "barrier_wait", lambda ref: None if ref.ref is skipped else wait(ref))
            return real(consumer, *args)

    return broken


def releasing_first(name: str, step_of: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel's step that gives its block back before it has read it."""

    def broken(real: Callable[..., Any], consumer: Any, *args: Any) -> Any:
        from jax import lax
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.barrier_arrive(getattr(consumer.shared, name).at[lax.rem(step_of(*args), jnp.int32(STAGES))])
        return real(consumer, *args)

    return broken


BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "keys used before they arrived": ("forward", without_waiting_for("k_full")),
    "values used before they arrived": ("forward", without_waiting_for("v_full")),
    "values released early": ("forward", releasing_first("v_free", lambda limits, i, carry: i)),
    "keys used before they arrived in dq": ("dq", without_waiting_for("k_full")),
    "values released early in dq": ("dq", releasing_first("v_free", lambda limits, i, carry: i)),
    "queries used before they arrived": ("dk, dv", without_waiting_for("q_full")),
    "gradients used before they arrived": ("dk, dv", without_waiting_for("d_out_full")),
    "queries released early": ("dk, dv", releasing_first("free", lambda limits, done, n, carry: done + n)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_pipeline_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels.gpu import flash_backward_key, flash_backward_query, flash_forward

    kernel, broken = BUGS[bug]
    module = {"forward": flash_forward, "dq": flash_backward_query, "dk, dv": flash_backward_key}[kernel]
    monkeypatch.setattr(module, "_step", functools.partial(broken, module._step))
    assert caught(kernel)


@pytest.mark.parametrize("kernel", ["forward", "dq", "dk, dv"])
def test_nothing_is_caught_where_no_bug_was_planted(kernel: str) -> None:
    assert not caught(kernel)
