"""paged_attention on Hopper GPUs: what is refused, tiles of queries, merged splits. Imports no kernel itself.

The kernel needs jax 0.11 (Mosaic GPU with warpgroup semantics). This module imports under any jax, and says so when
asked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..xla.paged import Tiles, cut_tiles
from .flash import DTYPES, LOG2_E, OLDEST_JAX, interpreter
from .paged_plan import Sizes, plan_for

NARROW = ("int8", "float8_e4m3fn")  # pools that are widened on the way, to bfloat16 queries
WIDEST_NARROW = 128  # beyond it, widening a block spills registers
WIDTHS = (64, 96, 128, 192, 256)
PAGES = (16, 32, 64, 128, 256)


def unsupported(dtypes: tuple[str, str, str], widths: tuple[int, int], heads: tuple[int, int], page: int) -> str | None:
    """Why the Hopper kernel cannot take a call, in one line; None if it can.

    Args:
      dtypes: of q, the key pages and the value pages.
      widths: of query and key heads, and of value heads.
      heads: of queries, and of keys and values.
      page: tokens of a page.
    """
    q, k, v = dtypes
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"the Hopper kernels need jax >= 0.11, found {jax.__version__}"
    if q not in DTYPES:
        return f"q is {q}: the Hopper kernels take {' or '.join(DTYPES)}"
    pools = (q, *NARROW) if q == "bfloat16" else (q,)
    if k != v or k not in pools:
        return f"pages are {k} and {v}: for {q} queries the Hopper kernel takes {' or '.join(pools)}, one for both"
    if not set(widths) <= set(WIDTHS):
        return f"head widths (keys, values) are {widths}: the Hopper kernel takes {', '.join(map(str, WIDTHS))}"
    if k in NARROW and max(widths) > WIDEST_NARROW:
        return f"head widths (keys, values) are {widths}: with 8-bit pages the Hopper kernel goes up to {WIDEST_NARROW}"
    if page not in PAGES:
        return f"pages have {page} tokens: the Hopper kernel takes {', '.join(map(str, PAGES))}"
    if heads[0] // heads[1] > 64:
        return f"{heads[0]} query heads share {heads[1]} key heads: the Hopper kernel goes up to 64 to one"
    return None


def paged_attention_gpu(
    q: Float[Array, "T N H"],
    k_pages: Array,
    v_pages: Array,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None,
    scale: float,
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """As `paged_attention_reference`, on Hopper. Not differentiable: decoding has no gradient.

    Args:
      k_pages, v_pages: pools [P, page, K, H] and [P, page, K, Hv]; 8-bit ones hold `value / scale`.
      k_scale, v_scale: per key head, multiply scores and outputs; None for 1.
      interpret: True runs the kernel on the CPU, in Mosaic GPU's interpreter with its race detector on; or the
        interpreter's parameters.

    Raises ValueError for what `unsupported` names.
    """
    (T, N, H), (page, K), Hv = q.shape, k_pages.shape[1:3], v_pages.shape[3]
    dtypes = (q.dtype.name, k_pages.dtype.name, v_pages.dtype.name)
    reason = unsupported(dtypes, (H, Hv), (N, K), page)
    if reason is not None:
        raise ValueError(f"implementation='pallas_gpu': {reason}")
    if not T or not lengths.shape[0]:
        return jnp.zeros((T, N, Hv), q.dtype), jnp.full((T, N), -jnp.inf, jnp.float32)

    from .paged_forward import Operands, paged_forward

    positions = page_table.shape[1] * page
    sizes = Sizes(T, lengths.shape[0], N, K, H, Hv, positions, k_pages.dtype.itemsize)
    plan = plan_for(sizes, window)
    tiles = cut_tiles(query_starts.astype(jnp.int32), lengths.astype(jnp.int32), T, plan.tokens)
    first = tiles.position[:, 0]
    last = first - 1 + (tiles.rows < T).sum(axis=1, dtype=jnp.int32)
    factor = jnp.full(K, scale, jnp.float32) if k_scale is None else k_scale * scale  # [K]
    out, lse = paged_forward(
        Operands(
            _packed_queries(q, jnp.sign(factor), tiles, plan.rows),
            k_pages,
            v_pages,
            page_table.astype(jnp.int32),
            tiles.sequence,
            first,
            last,
            jnp.where(factor == 0, 1.0, jnp.abs(factor)) * LOG2_E,  # the kernel counts on a positive factor
            v_scale,
        ),
        plan=plan,
        interpret=interpreter(interpret),
    )
    out, lse = (out[0], lse[0]) if plan.splits == 1 else _merge(out, lse)
    places = jnp.arange(tiles.rows.size, dtype=jnp.int32)
    place = jnp.full(T, tiles.rows.size, jnp.int32).at[tiles.rows.reshape(-1)].set(places, mode="drop")  # [T]
    out = _unpacked(out, place, plan.tokens, N // K, 0.0).reshape(T, N, Hv)
    return out.astype(q.dtype), _unpacked(lse, place, plan.tokens, N // K, -jnp.inf).reshape(T, N)


def _packed_queries(
    q: Float[Array, "T N H"], signs: Float[Array, "K"], tiles: Tiles, rows: int
) -> Float[Array, "M K rows H"]:
    """Row r of a tile is token r // G and query head r % G of its key head."""
    (T, N, H), K = q.shape, signs.shape[0]
    signed = q.reshape(T, K, N // K, H) * signs.astype(q.dtype)[None, :, None, None]  # [T, K, G, H]
    packed = signed.at[tiles.rows].get(mode="fill", fill_value=0)  # [M, tile, K, G, H]
    packed = packed.transpose(0, 2, 1, 3, 4).reshape(packed.shape[0], K, -1, H)
    return jnp.pad(packed, ((0, 0), (0, 0), (0, rows - packed.shape[2]), (0, 0)))


def _unpacked(x: Array, place: Int[Array, "T"], tokens: int, group: int, padding: float) -> Array:
    """[M, K, rows, ...] as [T, K, G, ...]: of each packed row what stands at its place among the tiles' tokens."""
    M, K = x.shape[:2]
    by_token = x[:, :, : tokens * group].reshape(M, K, tokens, group, *x.shape[3:])
    return by_token.at[place // tokens, :, place % tokens].get(mode="fill", fill_value=padding)


def _merge(
    out: Float[Array, "splits M K rows Hv"], lse: Float[Array, "splits M K rows"]
) -> tuple[Float[Array, "M K rows Hv"], Float[Array, "M K rows"]]:
    """The whole from its splits; what a split left undefined has no weight, and is not multiplied by it."""
    top = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))  # [splits, M, K, rows]
    total = weights.sum(axis=0)
    # One sum after the other, not a reduction: the compiler makes one fusion of it, with what follows.
    shares = [jnp.where(w[..., None] > 0, w[..., None] * o, 0.0) for w, o in zip(weights, out, strict=True)]
    merged = functools.reduce(jnp.add, shares) / jnp.where(total > 0, total, 1.0)[..., None]
    return merged, jnp.log(total) + jnp.where(jnp.isfinite(top), top, 0.0)
