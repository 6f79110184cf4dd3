"""flash_attention on Hopper GPUs: checks, padding and the gradient around the three kernels. Imports no kernel itself.

The kernels need jax 0.11 (Mosaic GPU with warpgroup semantics). This module imports under any jax, and says so when
asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..xla.flash import flash_attention_xla, flash_gradients_xla
from .extent import Extent
from .tiles import TILE, TILES, Pipeline, Tiles

OLDEST_JAX = (0, 11)
DTYPES = ("bfloat16", "float16")
LOG2_E = 1.4426950408889634
Results = TypeVar("Results")
UNSEEN = 1e30  # stands for the log-sum-exp of a row that sees nothing: every weight recomputed from it is 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernels depend on besides array shapes: all static."""

    extent: Extent
    scale: float
    tiles: Tiles
    interpret: Any


def unsupported(dtypes: tuple[str, ...], widths: tuple[int, int]) -> str | None:
    """Why the Hopper kernels cannot take q, k, v of these dtypes and (q, v) head widths, in one line; else None."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"the Hopper kernels need jax >= 0.11, found {jax.__version__}"
    if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
        return f"q, k, v are {', '.join(dtypes)}: the Hopper kernels take {' or '.join(DTYPES)}, one for all"
    if kernel_widths(*widths) is None:
        return f"head widths (q, v) are {widths}: the Hopper kernels go up to {max(TILES)}"
    return None


def kernel_widths(width: int, value_width: int) -> tuple[int, int] | None:
    """The narrowest pair of widths with a kernel that hold these; None where there is none."""
    holding = [pair for pair in TILES if pair[0] >= width and pair[1] >= value_width]
    return min(holding, key=sum, default=None)


def flash_attention_gpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """As `flash_attention_reference`, on Hopper. Differentiable in q, k, v, through both results.

    Args:
      interpret: True runs the kernels on the CPU, in Mosaic GPU's interpreter with its race detector on; or the
        interpreter's parameters.

    Head widths between those of `TILES` are padded with zeros to the next. Segments whose ids each fill one unbroken
    run of positions are handled by the kernels. Where an id returns after another one, which is only known when the
    call runs, the blockwise XLA implementation takes over.

    Raises ValueError for what `unsupported` names.
    """
    widths = _checked_widths(q, k, v)
    (B, T, N, _), S, Hv = q.shape, k.shape[1], v.shape[-1]
    if not T or not S:
        return jnp.zeros((B, T, N, Hv), q.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    plan = Plan(Extent(window, T, S), abs(scale) or 1.0, TILES[widths], interpreter(interpret))
    offset = jnp.asarray(query_offset, jnp.int32).reshape(1)

    def by_kernels(segments: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        results: Any = _attend(plan, *_widened(widths, _signed(q, scale), k, v), offset, segments)
        return results[0][..., :Hv], results[1]

    def by_xla() -> tuple[Array, Array]:
        return flash_attention_xla(
            q,
            k,
            v,
            window=window,
            query_segments=query_segments,
            key_segments=key_segments,
            query_offset=query_offset,
            scale=scale,
        )

    return _where_unbroken(query_segments, key_segments, by_kernels, by_xla)


def flash_gradients_gpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    d_out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    *,
    window: int | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """As `flash_gradients_reference`, by the backward kernels. T and S are at least 1.

    Raises ValueError for what `unsupported` names.
    """
    widths = _checked_widths(q, k, v)
    (T, H), (S, Hv) = q.shape[1::2], v.shape[1::2]
    plan = Plan(Extent(window, T, S), abs(scale) or 1.0, TILES[widths], interpreter(interpret))
    offset = jnp.asarray(query_offset, jnp.int32).reshape(1)

    def by_kernels(segments: tuple[Array, Array] | None = None) -> tuple[Array, Array, Array]:
        operands = _widened(widths, _signed(q, scale), k, v)
        dq, dk, dv = backward(plan, *operands, offset, segments, _pad(d_out, 3, widths[1]), lse, delta)
        return _signed(dq[..., :H], scale), dk[..., :H], dv[..., :Hv]

    def by_xla() -> tuple[Array, Array, Array]:
        return flash_gradients_xla(
            q,
            k,
            v,
            d_out,
            lse,
            delta,
            window=window,
            query_segments=query_segments,
            key_segments=key_segments,
            query_offset=query_offset,
            scale=scale,
        )

    return _where_unbroken(query_segments, key_segments, by_kernels, by_xla)


def _checked_widths(q: Array, k: Array, v: Array) -> tuple[int, int]:
    reason = unsupported(tuple(x.dtype.name for x in (q, k, v)), (q.shape[-1], v.shape[-1]))
    widths = kernel_widths(q.shape[-1], v.shape[-1])
    if reason is not None or widths is None:
        raise ValueError(f"implementation='pallas_gpu': {reason}")
    return widths


def _signed(x: Array, scale: float) -> Array:
    """The kernels count on a positive scale: its sign goes to the queries, and to their gradient."""
    return x if scale > 0 else x * np.sign(scale).astype(x.dtype)


def _widened(widths: tuple[int, int], q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    return _pad(q, 3, widths[0]), _pad(k, 3, widths[0]), _pad(v, 3, widths[1])


def _where_unbroken(
    query_segments: Array | None,
    key_segments: Array | None,
    by_kernels: Callable[..., Results],
    by_xla: Callable[[], Results],
) -> Results:
    """By the kernels, unless a segment's id returns after another one."""
    if query_segments is None or key_segments is None:
        return by_kernels()

    from .spans import unbroken

    segments = query_segments.astype(jnp.int32), key_segments.astype(jnp.int32)
    in_runs = unbroken(segments[0]) & unbroken(segments[1])
    return jax.lax.cond(in_runs, lambda: by_kernels(segments), by_xla)


def interpreter(interpret: Any) -> Any:
    """What to give plgpu.kernel: True becomes the interpreter with its race detector on."""
    if interpret is not True:
        return interpret
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]


def _pad(x: Array, axis: int, multiple: int, value: float = 0.0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, offset: Array, segments: Any) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, offset, segments)


def _forward(plan: Plan, q: Array, k: Array, v: Array, offset: Array, segments: Any) -> tuple[Array, Array]:
    from . import flash_forward
    from .spans import query_spans

    pipeline = plan.tiles.forward
    q, k, v = _pad(q, 1, TILE), _pad(k, 1, TILE), _pad(v, 1, TILE)
    spans = None
    if segments is not None:
        spans = query_spans(plan.extent, segments[0], segments[1], offset, pipeline.block)
    out, lse = flash_forward.flash_forward(
        flash_forward.Operands(q, k, v, offset, spans),
        extent=plan.extent,
        scale=plan.scale,
        block=pipeline.block,
        stages=pipeline.stages,
        interpret=plan.interpret,
    )
    rows = plan.extent.queries
    return out[:, :rows], lse[:, :, :rows].transpose(0, 2, 1)


def _forward_with_residuals(
    plan: Plan, q: Array, k: Array, v: Array, offset: Array, segments: Any
) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _forward(plan, q, k, v, offset, segments)
    return (out, lse), (q, k, v, offset, segments, out, lse)


def _backward(plan: Plan, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, offset, segments, out, lse = residuals
    d_out, d_lse = cotangents
    # dS = P * (dP - sum(dO * O) + dLSE): the last two are one number per row.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, T, N]
    gradients = backward(plan, q, k, v, offset, segments, d_out, lse, delta)
    return *gradients, *jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (offset, segments))


_attend.defvjp(_forward_with_residuals, _backward)


def backward(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    offset: Int[Array, "1"],
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    d_out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """The gradients of q, k and v by the kernels, given the log-sum-exp and `sum(dO * O) - dLSE` of every row."""
    from .flash_backward_key import flash_backward_key
    from .flash_backward_query import Operands, flash_backward_query
    from .spans import key_spans, query_spans

    base_2 = jnp.where(jnp.isfinite(lse), lse * LOG2_E, UNSEEN)
    q, k, v = _pad(q, 1, TILE), _pad(k, 1, TILE), _pad(v, 1, TILE)
    d_out = _pad(d_out.astype(q.dtype), 1, TILE)
    base_2 = _pad(base_2.transpose(0, 2, 1), 2, TILE, UNSEEN)
    delta = _pad(delta.transpose(0, 2, 1), 2, TILE)
    operands = Operands(q, k, v, d_out, base_2, delta, offset, None)
    settings = {"extent": plan.extent, "scale": plan.scale, "interpret": plan.interpret}

    def arranged(spans_of: Any, pipeline: Pipeline) -> dict[str, Any]:
        spans = None if segments is None else spans_of(plan.extent, *segments, offset, pipeline.block)
        return {
            "operands": operands._replace(spans=spans),
            "block": pipeline.block,
            "stages": pipeline.stages,
            **settings,
        }

    dq = flash_backward_query(**arranged(query_spans, plan.tiles.query))
    if plan.tiles.value is None:
        dk, dv = flash_backward_key(**arranged(key_spans, plan.tiles.key))
    else:
        (dk,) = flash_backward_key(**arranged(key_spans, plan.tiles.key), sums="keys")
        (dv,) = flash_backward_key(**arranged(key_spans, plan.tiles.value), sums="values")
    return dq[:, : plan.extent.queries], dk[:, : plan.extent.keys], dv[:, : plan.extent.keys]
