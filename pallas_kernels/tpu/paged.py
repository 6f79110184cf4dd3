"""paged_attention on TPU: what the Mosaic kernel supports, its tiles, and the layout of arrays around it.

Interpreted on CPU and compiled for v5e, v6e and tpu7x; no chip has run it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Num

from ..paged_dispatch import PagedProblem
from .block_sizes import LANES
from .paged_call import PagedCall
from .paged_fetch import Paging
from .paged_kernel import paged_call
from .paged_rows import row_constants
from .paged_tiles import paged_tiles, tile_count
from .tiles import LOG2_E

POOL_DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")


class PagedSizes(NamedTuple):
    """How a call is cut.

    block_bytes: keys and values fetched together; two such blocks are held.
    block_tokens: the most tokens of a block.
    row_entries: entries, of all heads of a unit, per matrix product by rows.
    packed_scores: rows times key heads up to which a tile is computed by rows.
    row_tokens: the most tokens of a tile computed by rows.
    tile_rows: rows per key head of a tile computed by lanes.
    lanes: queries of one head whose scores are computed at once.
    chunk: tokens laid out by heads at once.
    table_piece: page-table entries fetched together.
    """

    block_bytes: int = 2 << 20
    block_tokens: int = 512
    row_entries: int = 1024
    packed_scores: int = 1024
    row_tokens: int = 8
    tile_rows: int = 1024
    lanes: int = LANES
    chunk: int = 128
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
    T, N, _ = q.shape
    results = jnp.zeros((T, N, v_pages.shape[-1]), q.dtype), jnp.full((T, 1, N), -jnp.inf, jnp.float32)
    run = _Run(q, k_pages, v_pages, page_table, query_starts, lengths, window, interpret, sizes or PagedSizes())
    K = k_pages.shape[2]
    ones = jnp.ones(K, jnp.float32)
    factors = ((ones if k_scale is None else k_scale) * (scale * LOG2_E), ones if v_scale is None else v_scale)
    counts = query_starts[1:] - query_starts[:-1]
    for call, most, chosen in run.calls(counts):
        results = run.attend(call, most, chosen, factors, results)
    out, lse = results
    return out, lse[:, 0]


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n, and 1 for n < 1."""
    return 1 << (max(n, 1).bit_length() - 1)


class _Run(NamedTuple):
    """The arguments of `paged_attention_tpu` that do not change between its kernel calls."""

    q: Float[Array, "T N H"]
    k_pages: Num[Array, "P page K H"]
    v_pages: Num[Array, "P page K Hv"]
    page_table: Int[Array, "B pages"]
    query_starts: Int[Array, "B_plus_1"]
    lengths: Int[Array, "B"]
    window: int | None
    interpret: Any
    sizes: PagedSizes

    def calls(self, counts: Int[Array, "B"]) -> list[tuple[PagedCall, int, Bool[Array, "B"]]]:
        """Kernel calls, the most tiles that each may need, and the sequences that it serves.

        Few queries per sequence are one call by rows. Otherwise sequences with one query are decoded by rows, and the
        others computed by lanes.
        """
        (T, N, _), B, K = self.q.shape, self.lengths.shape[0], self.k_pages.shape[2]
        if not T:
            return []
        share = 1 << (-(-T // B) - 1).bit_length()
        if share <= min(self.sizes.row_tokens, self.sizes.packed_scores // (N * K)) or share == 1:
            return [(self.call(share, by_rows=True), tile_count(T, B, share), counts > 0)]
        rows = min(_power_of_two(2 * T - 1), _power_of_two(self.sizes.tile_rows * K // N))
        tile = max(rows, self.sizes.lanes)
        by_lanes = self.call(tile, by_rows=False), tile_count(T, B, tile)
        if B == 1:
            return [(*by_lanes, counts > 0)]
        return [(self.call(1, by_rows=True), min(T, B), counts == 1), (*by_lanes, counts > 1)]

    def call(self, tile: int, by_rows: bool) -> PagedCall:
        """The static description of a kernel call over tiles of `tile` tokens."""
        K, paging = self.k_pages.shape[2], self.paging()
        head_major = False
        units = K if head_major or not by_rows else 1
        tokens = self.sizes.row_entries * units // K if by_rows else self.sizes.chunk
        chunk = min(max(_power_of_two(tokens // paging.page) * paging.page, paging.page), paging.block)
        groups = self.q.shape[1] // K
        return PagedCall(
            paging, K, groups, tile, by_rows, units, head_major, chunk, self.sizes.lanes, self.interpret, 100 << 20
        )

    def paging(self) -> Paging:
        """Powers of two, so that neither blocks nor pieces straddle."""
        page, K, H = self.k_pages.shape[1:]
        token_bytes = K * (H + self.v_pages.shape[-1]) * self.k_pages.dtype.itemsize
        tokens = min(self.sizes.block_tokens, self.sizes.block_bytes // token_bytes)
        width, per_block = self.page_table.shape[1], _power_of_two(tokens // page)
        piece = _power_of_two(min(self.sizes.table_piece, 2 * width - 1))
        return Paging(page, width, per_block, max(piece, per_block, LANES), self.window)

    def attend(
        self,
        call: PagedCall,
        most: int,
        chosen: Bool[Array, "B"],
        factors: tuple[Float[Array, "K"], Float[Array, "K"]],
        results: tuple[Float[Array, "T N Hv"], Float[Array, "T 1 N"]],
    ) -> tuple[Float[Array, "T N Hv"], Float[Array, "T 1 N"]]:
        """`results` with the rows of the chosen sequences filled in; they need at most `most` tiles."""
        paging = call.paging
        table = jnp.pad(self.page_table, ((0, 0), (0, -paging.pages % paging.pages_per_piece)))
        scalars = paged_tiles(self.query_starts, self.lengths, call.tile, most, chosen)
        constants = row_constants(call, *factors) if call.by_rows else jnp.stack(factors)
        pools = (self.k_pages, self.v_pages)
        return paged_call(call, scalars, constants, self.q, results, table, pools, self.cost())

    def cost(self) -> pl.CostEstimate:
        return pl.CostEstimate(flops=1, transcendentals=1, bytes_accessed=1)
