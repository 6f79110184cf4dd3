"""paged_attention on TPU: what the Mosaic kernels support, and the calls that serve one operation.

Interpreted on CPU and compiled for v5e, v6e and tpu7x; no chip has run them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ..paged_dispatch import PagedProblem
from .block_sizes import LANES, generation
from .paged_kernel import SUBLANES, paged_call
from .paged_plan import PagedSizes, Shapes, plan
from .paged_rows import row_constants
from .paged_tiles import paged_tiles
from .tiles import LOG2_E

DTYPES = ("bfloat16", "float32")
POOL_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")


def unsupported(problem: PagedProblem) -> str | None:
    """Why the kernels do not serve a call, in one line, or None if they do. The interpreters take any widths."""
    if problem.dtype not in DTYPES:
        return f"q is {problem.dtype}, expected {' or '.join(DTYPES)}"
    if problem.pool_dtype not in POOL_DTYPES:
        return f"the pools are {problem.pool_dtype}, expected {' or '.join(POOL_DTYPES)}"
    if problem.interpret:
        return None
    for name, width in zip(("q", "v"), problem.widths, strict=True):
        if width % LANES:
            return f"{name} has head width {width}, expected a multiple of {LANES}"
    (N, K), pool = problem.heads, jnp.dtype(problem.pool_dtype)
    sizes = problem.rows, problem.sequences, N, K, *problem.widths, problem.page, problem.table_width
    shapes = Shapes(jnp.dtype(problem.dtype), (pool, pool), *sizes, window=None)
    if shapes.head_major and problem.page % SUBLANES:
        return f"pages of {problem.page} tokens with {K} key heads, expected a multiple of {SUBLANES} tokens"
    try:
        plan(shapes, generation(), False, PagedSizes())
    except ValueError as error:
        return str(error)
    return None


def paged_attention_tpu(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"],
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None,
    scale: float,
    k_scale: Float[Array, "K"] | None,
    v_scale: Float[Array, "K"] | None,
    interpret: Any = False,
    sizes: PagedSizes | None = None,
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """As `paged_attention_reference`. Not differentiable: decoding has no gradient.

    `interpret` (True, or parameters of the TPU interpreter) runs the kernels on CPU, step by step; `sizes` are the
    defaults unless given.
    """
    (T, N, H), (page, K), (B, pages) = q.shape, k_pages.shape[1:3], page_table.shape
    pools = (k_pages, v_pages)
    dtypes = (k_pages.dtype, v_pages.dtype)
    shapes = Shapes(q.dtype, dtypes, T, B, N, K, H, v_pages.shape[-1], page, pages, window)
    if shapes.head_major:
        pools = (k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2))  # what lies in memory: nothing is copied
    ones = jnp.ones(K, jnp.float32)
    factors = ((ones if k_scale is None else k_scale) * (scale * LOG2_E), ones if v_scale is None else v_scale)
    counts = query_starts[1:] - query_starts[:-1]
    results = jnp.zeros((T, N, v_pages.shape[-1]), q.dtype), jnp.full((T, 1, N), -jnp.inf, jnp.float32)
    for call, most, least_queries, most_queries, cost in plan(shapes, generation(), interpret, sizes or PagedSizes()):
        chosen = (counts >= least_queries) & (counts <= most_queries)
        scalars = paged_tiles(query_starts, lengths, call.tile, most, chosen)
        table = jnp.pad(page_table, ((0, 0), (0, -pages % call.paging.pages_per_piece)))
        constants = row_constants(call, *factors) if call.by_rows else jnp.stack(factors)
        results = paged_call(call, scalars, constants, q, results, table, pools, cost)
    out, lse = results
    return out, lse[:, 0]
