"""flash_attention_gradients: the backward pass of flash_attention over some of the keys, for sums that are merged.

`flash_attention` differentiates by itself. This is for whoever splits the keys of a softmax: attention over parts of
the keys merges by log-sum-exp, and its gradient is a sum over the same parts, given the merged log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .arguments import check_flash_arrays, check_heads_and_window, check_offset_and_scale, split_segments
from .dispatch import Row, choose, target
from .flash_dispatch import TABLE, FlashProblem, Implementation

FUNCTIONS = {
    "pallas_tpu": "flash_gradients_tpu",
    "pallas_gpu": "flash_gradients_gpu",
    "xla": "flash_gradients_xla",
    "reference": "flash_gradients_reference",
}
# Each beside the forward pass that it belongs to, and chosen in the same order.
GRADIENTS: dict[str, Row[FlashProblem]] = {
    name: dataclasses.replace(row, function=FUNCTIONS[name]) for name, row in TABLE.items() if name in FUNCTIONS
}


def flash_attention_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    d_out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: Int[Array, ""] | int = 0,
    scale: float | None = None,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """What the keys at hand add to the gradient of causal attention over more keys than these.

    With weights `P = exp(scale * q k^T - lse)` of the pairs that are visible (FlashAttention-2, arXiv 2307.08691,
    section 3.1.2): `dS = P * (d_out v^T - delta)`, `dq = scale * dS k`, `dk = scale * dS^T q`, `dv = P^T d_out`. The
    dq of all parts of the keys add up to the gradient of the merged attention; so do the dk and dv of all queries.

    Args:
      q, k, v, window, segment_ids, query_offset, scale: as `flash_attention` takes them, for these keys.
      d_out: gradient of the merged output, in the dtype of q.
      lse: log-sum-exp of each query over all its keys, float32.
      delta: `sum(d_out * out, axis=-1)` of the merged output, float32 (less the gradient of lse, if it has one).
      implementation, interpret: as for `flash_attention`; "cudnn" has no such pass.

    Returns gradients of q, k and v in their dtype. Raises ValueError for arguments that do not fit together.
    """
    check_flash_arrays(q, k, v)
    check_heads_and_window(q.shape[2], k.shape[2], window)
    check_offset_and_scale(query_offset, scale)
    _check_rows(q, v, d_out, lse, delta)
    query_segments, key_segments = split_segments(segment_ids, q, k)
    if implementation not in GRADIENTS and implementation != "auto":
        names = [name for name in typing.get_args(Implementation) if name == "auto" or name in GRADIENTS]
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(names)}")
    if not q.shape[1] or not k.shape[1]:
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    known_offset = int(query_offset) if isinstance(query_offset, int | np.integer) else None
    problem = FlashProblem(
        target(),
        str(q.dtype),
        (q.shape[-1], v.shape[-1]),
        (q.shape[1], k.shape[1]),
        known_offset,
        query_segments is not None,
        return_lse=True,
        interpret=bool(interpret),
    )
    run = choose("flash_attention_gradients", GRADIENTS, implementation, problem)
    return run(
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        window=None if window is None else int(window),
        query_segments=query_segments,
        key_segments=key_segments,
        query_offset=query_offset if known_offset is None else known_offset,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        **({"interpret": interpret} if interpret else {}),
    )


def _check_rows(q: Array, v: Array, d_out: Array, lse: Array, delta: Array) -> None:
    rows = tuple(q.shape[:3])
    for name, array, expected in (
        ("d_out", d_out, (*rows, v.shape[3])),
        ("lse", lse, rows),
        ("delta", delta, rows),
    ):
        if tuple(array.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(array.shape)}: expected {expected}")
    if d_out.dtype != q.dtype:
        raise ValueError(f"d_out is {d_out.dtype}, q is {q.dtype}: they must be equal")
