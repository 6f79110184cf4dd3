"""paged_attention in jax.numpy: gathers only visible pages, with one compiled program for every length.

The packed queries are cut into tiles that never cross a sequence. All tiles advance together through the key blocks
that their own window leaves, in a loop whose trip count is data: work follows the lengths, not the page table's width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from ..visibility import key_block_bounds, visible

MAX_TILE = 128  # query rows of one tile: enough reuse of each gathered key block
MIN_KEY_BLOCK = 256  # keys gathered per loop step: amortises the step, bounds the waste at a window's edges


class Tiles(NamedTuple):
    """Runs of query rows that belong to one sequence each; unused tiles have `last < first`."""

    rows: Int[Array, "M tile"]  # index of the packed query row, or T for none
    sequence: Int[Array, "M"]
    position: Int[Array, "M tile"]  # position of each row, or -1


def paged_attention_xla(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None,
    scale: float,
    k_scale: Float[Array, "K"] | None,
    v_scale: Float[Array, "K"] | None,
    value_width: int | None = None,
) -> tuple[Float[Array, "T N value"], Float[Array, "T N"]]:
    """As `paged_attention_reference`, tile by tile. Not differentiable: decoding has no gradient."""
    (T, N, _), (page, K) = q.shape, k_pages.shape[1:3]
    Hv = value_width if v_pages is None else v_pages.shape[-1]
    out_scale = k_scale if v_pages is None else v_scale
    pages_per_block = min(max(MIN_KEY_BLOCK // page, 1), page_table.shape[1])
    block = pages_per_block * page
    tiles = cut_tiles(query_starts, lengths, T, _tile_rows(T, lengths.shape[0]))
    queries = q.at[tiles.rows].get(mode="fill", fill_value=0)  # [M, tile, N, H]
    queries = queries.reshape(*tiles.rows.shape, K, N // K, -1).transpose(0, 2, 3, 1, 4)  # [M, K, G, tile, H]
    score_scale = scale if k_scale is None else scale * k_scale[:, None, None, None]  # [K, 1, 1, 1]
    first = jnp.min(jnp.where(tiles.position < 0, jnp.iinfo(jnp.int32).max, tiles.position), axis=1)
    last = jnp.max(tiles.position, axis=1)  # [M]
    used = last >= 0
    start, stop = key_block_bounds(jnp.where(used, first, 0), last, last + 1, block, window)
    n_steps = jnp.max(jnp.where(used, stop - start, 0))

    def one_step(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        page_numbers = (start + step)[:, None] * pages_per_block + jnp.arange(pages_per_block, dtype=jnp.int32)
        page_ids = page_table.at[tiles.sequence[:, None], page_numbers].get(mode="fill", fill_value=0)
        at = (start + step)[:, None] * block + jnp.arange(block, dtype=jnp.int32)  # [M, block]
        mask = visible(tiles.position[:, :, None], at[:, None, :], window) & (tiles.position >= 0)[:, :, None]
        seen = mask.any(axis=1)[:, :, None, None]  # [M, block, 1, 1]
        keys = jnp.where(seen, k_pages[page_ids].reshape(-1, block, K, k_pages.shape[-1]), 0).astype(q.dtype)
        if v_pages is None:
            values = keys[..., :Hv]
        else:
            values = jnp.where(seen, v_pages[page_ids].reshape(-1, block, K, Hv), 0).astype(q.dtype)
        scores = jnp.einsum("MKGTH,MSKH->MKGTS", queries, keys, preferred_element_type=jnp.float32) * score_scale
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        finite_top = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        weights = jnp.exp(scores - finite_top[..., None])
        decay = jnp.exp(top - finite_top)
        mixed = jnp.einsum("MKGTS,MSKH->MKGTH", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return new_top, total * decay + weights.sum(axis=-1), acc * decay[..., None] + mixed

    rows = queries.shape[:4]
    begin = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, Hv), jnp.float32),
    )
    top, total, acc = jax.lax.fori_loop(0, n_steps, one_step, begin)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    if out_scale is not None:
        out = out * out_scale[:, None, None, None]
    lse = jnp.log(total) + jnp.where(jnp.isfinite(top), top, 0.0)
    packed_out = jnp.zeros((T, N, Hv), q.dtype)
    packed_lse = jnp.full((T, N), -jnp.inf, jnp.float32)
    out = out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(*tiles.rows.shape, N, Hv)
    lse = lse.transpose(0, 3, 1, 2).reshape(*tiles.rows.shape, N)
    return packed_out.at[tiles.rows].set(out, mode="drop"), packed_lse.at[tiles.rows].set(lse, mode="drop")


def _tile_rows(n_tokens: int, n_sequences: int) -> int:
    """Rows of a tile: about a sequence's even share, as a power of two, so that a decode batch has tiles of one row."""
    share = max(n_tokens // max(n_sequences, 1), 1)
    return min(1 << (share - 1).bit_length(), MAX_TILE)


def cut_tiles(query_starts: Int[Array, "B_plus_1"], lengths: Int[Array, "B"], n_tokens: int, tile: int) -> Tiles:
    """Cuts every sequence's query rows into tiles of `tile` rows; the last one of a sequence may be short.

    The number of tiles is static: the most that any split of `n_tokens` rows over the sequences can need.
    """
    B = lengths.shape[0]
    counts = query_starts[1:] - query_starts[:-1]  # [B]
    ends = jnp.cumsum(-(-counts // tile))  # tiles used up to and including each sequence
    most = n_tokens if tile == 1 else n_tokens // tile + min(B, n_tokens)
    index = jnp.arange(most, dtype=jnp.int32)
    sequence = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(
        jnp.int32
    )  # [M], B for unused tiles
    safe = jnp.minimum(sequence, B - 1)
    within = index - jnp.where(safe > 0, ends[safe - 1], 0)
    row = within[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)  # [M, tile], row within the sequence
    real = (row < counts[safe][:, None]) & (sequence < B)[:, None]
    packed = jnp.where(real, query_starts[safe][:, None] + row, n_tokens)
    position = jnp.where(real, (lengths - counts)[safe][:, None] + row, -1)
    return Tiles(packed, safe, position)
