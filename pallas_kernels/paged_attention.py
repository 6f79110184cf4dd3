"""paged_attention: ragged queries of many sequences against a paged cache, and the write that fills its pages.

Checks and dispatch only.
"""

from __future__ import annotations

from typing import Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .flash_attention import check_heads_and_window
from .flash_dispatch import Implementation
from .reference import paged_attention_reference, token_positions
from .xla.paged import paged_attention_xla

IMPLEMENTATIONS = {"reference": paged_attention_reference, "xla": paged_attention_xla}


@overload
def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P page K H"],
    v_pages: Float[Array, "P page K Hv"],
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation = "auto",
) -> Float[Array, "T N Hv"]: ...


@overload
def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P page K H"],
    v_pages: Float[Array, "P page K Hv"],
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]: ...


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Float[Array, "P page K H"],
    v_pages: Float[Array, "P page K Hv"],
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Float[Array, "T N Hv"] | tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]:
    """Causal grouped-query attention of packed queries over keys and values kept in pages.

    Sequence b owns query rows `query_starts[b] .. query_starts[b+1]-1`, the last of its `lengths[b]` tokens, whose keys
    are already written: row i of n stands at position `lengths[b] - n + i`. Its key at position p lies in page
    `page_table[b, p // page]` at place `p % page`. Rows past `query_starts[-1]` are padding and give zeros.

    Page 0 is the null page. Entries of pages that the window has left may be 0, and whatever stands there, behind the
    window, or past `lengths`, NaN included, never reaches the result.

    Args:
      q: packed queries, rotated already.
      k_pages, v_pages: pools of pages; Hv may differ from H.
      page_table: page of each run of `page` positions, by absolute page number.
      query_starts: first query row of each sequence, and the end of the last.
      lengths: tokens of each sequence, this call's included.
      window: keys a query sees, itself included; None for all before it.
      scale: multiplies the scores; None means `H ** -0.5`.
      return_lse: also return the log-sum-exp [T, N], float32, -inf for rows that see nothing; partial results merge by
        it.
      implementation: "reference" (dense), "xla" (visible pages only), or "auto".

    Raises ValueError for arguments that do not fit together.
    """
    _check(q, k_pages, v_pages, page_table, query_starts, window, implementation)
    run = IMPLEMENTATIONS["xla" if implementation == "auto" else implementation]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = run(q, k_pages, v_pages, page_table, query_starts, lengths, window=window, scale=factor)
    return (out, lse) if return_lse else out


def token_slots(
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    n_tokens: int,
    page_size: int,
    n_pages: int,
) -> Int[Array, "T"]:
    """Where each packed row's key and value go, as an index into the flattened pool [P * page].

    Padding rows, positions past the page table, and null pages give `P * page`, one past the end, which `write_pages`
    drops.
    """
    sequence, position = token_positions(query_starts, lengths, n_tokens)
    page = page_table.at[jnp.clip(sequence, 0), jnp.clip(position, 0) // page_size].get(mode="fill", fill_value=0)
    writable = (position >= 0) & (page > 0) & (page < n_pages)
    return jnp.where(writable, page * page_size + position % page_size, n_pages * page_size)


def write_pages(
    pages: Float[Array, "P page K H"], new: Float[Array, "T K H"], slots: Int[Array, "T"]
) -> Float[Array, "P page K H"]:
    """The pool with `new` written at `slots` (see `token_slots`): one scatter, in place where the pool is donated.

    A slot past the end is dropped, never clipped.
    """
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(new.astype(pages.dtype), mode="drop").reshape(pages.shape)


def _check(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    query_starts: Array,
    window: int | None,
    implementation: str,
) -> None:
    if k_pages.shape[-1] != q.shape[-1]:
        raise ValueError(f"k_pages has head width {k_pages.shape[-1]}, q has {q.shape[-1]}: they must be equal")
    if v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages is {v_pages.shape[:3]} and k_pages {k_pages.shape[:3]} in pages, size and heads: "
            "they must be equal"
        )
    if query_starts.shape[0] != page_table.shape[0] + 1:
        raise ValueError(
            f"query_starts has {query_starts.shape[0]} entries, expected {page_table.shape[0] + 1}: "
            "one more than the page table has sequences"
        )
    check_heads_and_window(q.shape[1], k_pages.shape[2], window)
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected 'auto' or one of {sorted(IMPLEMENTATIONS)}")
