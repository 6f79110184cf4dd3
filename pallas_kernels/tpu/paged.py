"""paged_attention on TPU: what the Mosaic kernel supports, its tiles, and the layout of arrays around it.

Interpreted on CPU and compiled for v5e, v6e and tpu7x; no chip has run it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Num

from ..paged_dispatch import PagedProblem
from .block_sizes import LANES
from .paged_fetch import Paging
from .paged_kernel import PagedCall, paged_call
from .paged_tiles import paged_tiles, tile_count
from .tiles import LOG2_E

POOL_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


class PagedSizes(NamedTuple):
    """How a call is cut.

    block_bytes: keys and values fetched together; two such blocks are held.
    block_tokens: the most tokens of a block.
    chunk_entries: keys, of all heads computed together, per matrix product.
    packed_scores: rows times key heads up to which all heads share one product, masked.
    tile_rows: rows per key head of a tile otherwise.
    table_piece: page-table entries fetched together.
    """

    block_bytes: int = 2 << 20
    block_tokens: int = 1024
    chunk_entries: int = 1024
    packed_scores: int = 1024
    tile_rows: int = 1024
    table_piece: int = 1024


def unsupported(problem: PagedProblem) -> str | None:
    """Why the kernel does not serve a call, in one line, or None if it does. The interpreters take any widths."""
    K = problem.heads[1]
    if problem.pool_dtype not in POOL_DTYPES:
        return f"the pools are {problem.pool_dtype}, expected {' or '.join(POOL_DTYPES)}"
    if problem.interpret:
        return None
    for name, width in zip(("q", "v"), problem.widths, strict=True):
        if width % LANES:
            return f"{name} has head width {width}, expected a multiple of {LANES}"
    packing = 4 // jnp.dtype(problem.pool_dtype).itemsize
    if K % packing or K & (K - 1):
        return f"the pools have {K} key heads of {problem.pool_dtype}, expected a power of two from {packing} on"
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
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    interpret: Any = False,
    sizes: PagedSizes | None = None,
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """As `paged_attention_reference`. Not differentiable."""
    sizes = PagedSizes() if sizes is None else sizes
    (T, N, _), B = q.shape, lengths.shape[0]
    K, Hv = k_pages.shape[2], v_pages.shape[-1]
    run = _Run(
        q, k_pages, v_pages, page_table, query_starts, lengths, window, scale, k_scale, v_scale, interpret, sizes
    )
    out, lse = jnp.zeros((T, N, Hv), q.dtype), jnp.full((T, N), -jnp.inf, jnp.float32)
    if not T:
        return out, lse
    counts = query_starts[1:] - query_starts[:-1]
    packed = 1 << max(sizes.packed_scores // (N * K), 1).bit_length() - 1  # tokens of a tile
    share = 1 << (-(-T // B) - 1).bit_length()
    if share <= packed:
        return run.attend(share, tile_count(T, B, share), counts > 0, True, out, lse)
    if B > 1:
        out, lse = run.attend(1, min(T, B), counts == 1, True, out, lse)
    many = counts > (1 if B > 1 else 0)
    tile = min(1 << (T - 1).bit_length(), max(sizes.tile_rows // (N // K), 1))
    return run.attend(tile, tile_count(T, B, tile), many, False, out, lse)


class _Run(NamedTuple):
    q: Any
    k_pages: Any
    v_pages: Any
    page_table: Any
    query_starts: Any
    lengths: Any
    window: int | None
    scale: float
    k_scale: Any
    v_scale: Any
    interpret: Any
    sizes: PagedSizes

    def attend(
        self, tile: int, most: int, chosen: Bool[Array, "B"], packed: bool, out: Array, lse: Array
    ) -> tuple[Array, Array]:
        """`out` and `lse` with the rows of the chosen sequences filled in."""
        (T, N, H), (page, K), Hv = self.q.shape, self.k_pages.shape[1:3], self.v_pages.shape[-1]
        U = 1 if packed else K
        rows = tile * N // U
        paging = self.paging()
        head_major = False
        chunk = min(paging.block, max(self.sizes.chunk_entries // (K // U), page))
        table = jnp.pad(self.page_table, ((0, 0), (0, -self.page_table.shape[1] % paging.pages_per_piece)))
        tiles = paged_tiles(self.query_starts, self.lengths, T, tile, most, chosen)
        queries = self.q.at[tiles.rows].get(mode="fill", fill_value=0)  # [M, tile, N, H]
        queries = queries.reshape(most, tile, U, N // U, H).swapaxes(1, 2).reshape(most, U, rows, H)
        call = PagedCall(paging, K, U, head_major, chunk, self.interpret, 64 << 20)
        mixed, sums = paged_call(
            call, tiles.scalars, self.row_constants(tile, U), queries, table, self.k_pages, self.v_pages, self.cost()
        )
        mixed = mixed.reshape(most, U, tile, N // U, Hv).swapaxes(1, 2).reshape(most, tile, N, Hv)
        sums = sums.reshape(most, U, tile, N // U).swapaxes(1, 2).reshape(most, tile, N)
        return out.at[tiles.rows].set(mixed, mode="drop"), lse.at[tiles.rows].set(sums, mode="drop")

    def paging(self) -> Paging:
        page, K, H = self.k_pages.shape[1:]
        token_bytes = K * (H + self.v_pages.shape[-1]) * self.k_pages.dtype.itemsize
        tokens = min(self.sizes.block_tokens, self.sizes.block_bytes // token_bytes)
        per_block = 1 << max(tokens // page, 1).bit_length() - 1
        width = self.page_table.shape[1]
        piece = max(min(self.sizes.table_piece, -(-width // LANES) * LANES), per_block)
        return Paging(page, width, per_block, 1 << (piece - 1).bit_length(), self.window)

    def row_constants(self, tile: int, U: int) -> Float[Array, "U rows 4"]:
        N, K = self.q.shape[1], self.k_pages.shape[2]
        shape = (U, tile, N // U)
        head = jnp.arange(N, dtype=jnp.int32).reshape(U, 1, N // U) // (N // K)
        ones = jnp.ones(K, jnp.float32)
        k_factor = (ones if self.k_scale is None else self.k_scale) * (self.scale * LOG2_E)
        v_factor = ones if self.v_scale is None else self.v_scale
        token = jnp.arange(tile, dtype=jnp.float32)[None, :, None]
        columns = (k_factor[head], v_factor[head], token, (head % (K // U)).astype(jnp.float32))
        stacked = jnp.stack([jnp.broadcast_to(x, shape) for x in columns], axis=-1)
        return stacked.reshape(U, -1, len(columns))

    def cost(self) -> pl.CostEstimate:
        return pl.CostEstimate(flops=1, transcendentals=1, bytes_accessed=1)
