"""flash_attention on TPU: lays arrays out for the Mosaic kernels, decides which blocks they visit, joins the gradient.

The kernels are in flash_forward.py and flash_backward.py. They have been interpreted on CPU and compiled for v5e, v6e
and tpu7x; no chip has run them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from .block_bounds import Extent, key_ranges, query_ranges, segment_overlap, segment_ranges
from .block_sizes import BlockSizes, Kernel, KernelBlocks, check_vmem, default_block_sizes, generation
from .flash_backward import Operands, dkv_call, dq_call
from .flash_forward import forward_call
from .tiles import LOG2_E, Call, Scalars

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


class Settings(NamedTuple):
    """What the compiled kernels depend on besides array shapes: all static. `offset` is None where it is traced."""

    window: int | None
    scale: float
    offset: int | None
    blocks: KernelBlocks
    interpret: Any


class Positions(NamedTuple):
    """Where the queries stand, and which segments queries and keys belong to (both None, or neither)."""

    offset: Int[Array, ""]
    query_segments: Int[Array, "B T"] | None
    key_segments: Int[Array, "B S"] | None


def flash_attention_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    window: int | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
    block_sizes: KernelBlocks | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """As `flash_attention_reference`. Differentiable in q, k, v, through both results.

    `block_sizes` are those of the chip unless given; `interpret` runs the kernels on CPU, step by step.

    Raises ValueError for a dtype that is neither bfloat16 nor float32, and for blocks that do not fit the chip.
    """
    (B, T, N, _), S = q.shape, k.shape[1]
    _check_dtypes(q, k, v)
    if not T or not S:
        return jnp.zeros((B, T, N, v.shape[-1]), q.dtype), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    settings = _settings(q, window, query_offset, scale, interpret, block_sizes)
    positions = Positions(jnp.asarray(query_offset, jnp.int32), query_segments, key_segments)
    return _flash(settings, q, k, v, positions)


def flash_gradients_tpu(
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
    interpret: bool | pltpu.InterpretParams = False,
    block_sizes: KernelBlocks | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """As `flash_gradients_reference`, by the two backward kernels. T and S are at least 1.

    Raises ValueError as `flash_attention_tpu` does.
    """
    _check_dtypes(q, k, v)
    settings = _settings(q, window, query_offset, scale, interpret, block_sizes)
    positions = Positions(jnp.asarray(query_offset, jnp.int32), query_segments, key_segments)
    return _gradients(settings, q, k, v, positions, d_out, lse, delta)


def _check_dtypes(q: Array, k: Array, v: Array) -> None:
    for name, array in {"q": q, "k": k, "v": v}.items():
        if array.dtype not in DTYPES or array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}: the TPU kernel takes bfloat16 or float32, the same for q, k, v")


def _settings(
    q: Array,
    window: int | None,
    query_offset: Array | int,
    scale: float,
    interpret: bool | pltpu.InterpretParams,
    block_sizes: KernelBlocks | None,
) -> Settings:
    return Settings(
        window,
        scale,
        int(query_offset) if isinstance(query_offset, int | np.integer) else None,
        default_block_sizes(generation(), q.dtype) if block_sizes is None else block_sizes,
        interpret,
    )


class Plan(NamedTuple):
    """One kernel's call: its static description, prefetched scalars, and segment ids padded to its blocks."""

    call: Call
    scalars: Scalars
    segments: tuple[Array, ...]


def _plan(settings: Settings, kernel: Kernel, positions: Positions, q: Array, k: Array, v: Array) -> Plan:
    (B, T, N, H), (S, K), Hv = q.shape, k.shape[1:3], v.shape[3]
    sizes: BlockSizes = getattr(settings.blocks, kernel).fitted(S)
    block, segmented = sizes.query_block(N // K, T), positions.query_segments is not None
    limit = check_vmem(kernel, generation(), sizes, block, N // K, H, Hv, q.dtype.itemsize, segmented)
    extent = Extent(T, S, settings.window, settings.offset, block, sizes.key_block)
    call = Call(extent, N // K, sizes.key_tile, sizes.lanes, settings.scale, segmented, settings.interpret, limit)
    ranges = query_ranges if kernel == "dkv" else key_ranges
    offset = positions.offset.reshape(1)
    if positions.query_segments is None or positions.key_segments is None:
        return Plan(call, Scalars(offset, *ranges(extent, positions.offset, None)), ())
    query_ids = _padded(positions.query_segments.astype(jnp.int32), 1, block, mode="edge")
    key_ids = _padded(positions.key_segments.astype(jnp.int32), 1, sizes.key_block, mode="edge")
    queries = segment_ranges(query_ids, block)
    overlap = segment_overlap(queries, segment_ranges(key_ids, sizes.key_block), B)
    scalars = Scalars(
        offset, *ranges(extent, positions.offset, overlap), *queries, *segment_ranges(key_ids, sizes.key_tile)
    )
    return Plan(call, scalars, (query_ids[:, None, :], key_ids[:, :, None]))


def _padded(x: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, mode=mode)


def _query_rows(x: Float[Array, "B T N H"], call: Call) -> Float[Array, "B K G Tp H"]:
    B, T, N, H = x.shape
    grouped = x.reshape(B, T, N // call.groups, call.groups, H).transpose(0, 2, 3, 1, 4)
    return _padded(grouped, 3, call.extent.query_block)


def _statistic(x: Float[Array, "B T N"], call: Call) -> Float[Array, "B K G 1 Tp"]:
    return _query_rows(x[..., None], call).swapaxes(3, 4)


def _key_rows(x: Float[Array, "B S K H"], call: Call) -> Float[Array, "B K Sp H"]:
    return _padded(x.transpose(0, 2, 1, 3), 2, call.extent.key_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(settings: Settings, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
    return _forward(settings, q, k, v, positions)


def _forward(settings: Settings, q: Array, k: Array, v: Array, positions: Positions) -> tuple[Array, Array]:
    B, T, N, _ = q.shape
    call, scalars, segments = _plan(settings, "forward", positions, q, k, v)
    values = _padded(v.transpose(0, 2, 3, 1), 3, call.extent.key_block)  # [B, K, Hv, S]
    out, lse = forward_call(call, scalars, _query_rows(q, call), _key_rows(k, call), values, segments)
    out = out[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
    return out, lse[:, :, :, 0, :T].transpose(0, 3, 1, 2).reshape(B, T, N)


def _forward_with_residuals(
    settings: Settings, q: Array, k: Array, v: Array, positions: Positions
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out, lse = _forward(settings, q, k, v, positions)
    return (out, lse), (q, k, v, positions, out, lse)


def _backward(
    settings: Settings, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Positions]:
    q, k, v, positions, out, lse = residuals
    d_out, d_lse = cotangents
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse  # [B, T, N]
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), positions)
    return *_gradients(settings, q, k, v, positions, d_out, lse, delta), no_gradient


def _gradients(
    settings: Settings, q: Array, k: Array, v: Array, positions: Positions, d_out: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    lse_2 = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2_E

    def operands(call: Call) -> Operands:
        return Operands(
            _query_rows(q, call),
            _query_rows(d_out, call),
            _statistic(lse_2, call),
            _statistic(delta, call),
            _key_rows(k, call),
            _key_rows(v, call),
        )

    B, T, N, H = q.shape
    call, scalars, segments = _plan(settings, "dq", positions, q, k, v)
    dq = dq_call(call, scalars, operands(call), segments)
    dq = dq[..., :T, :].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    call, scalars, segments = _plan(settings, "dkv", positions, q, k, v)
    dk, dv = dkv_call(call, scalars, operands(call), segments)
    dk, dv = (x[:, :, : k.shape[1]].transpose(0, 2, 1, 3) for x in (dk, dv))
    return dq, dk, dv


_flash.defvjp(_forward_with_residuals, _backward)
