"""Decoding with a full layer's pages spread over the context axis: page n of a sequence lies on shard n mod C.

Which page is whose, and attention of one query per sequence to all of them. Pages of a windowed layer are not spread:
they stay where the sequence is decoded.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import Implementation

from .merge import merge_partial


def split_page_table(page_table: Int[Array, "B pages"], shards: int) -> Int[Array, "C B shard_pages"]:
    """Each shard's entries of a table that is indexed by absolute page number: shard c's i-th is of page `i * C + c`.

    Entries stay what they are, pages of the pool of the shard that has them. What the last cycle lacks is 0.
    """
    B, pages = page_table.shape
    whole = jnp.pad(page_table, ((0, 0), (0, -pages % shards)))
    return whole.reshape(B, -1, shards).transpose(2, 0, 1)


def own_page_table(
    shard_table: Int[Array, "B shard_pages"], shard: Int[Array, ""] | int, shards: int
) -> Int[Array, "B pages"]:
    """A shard's table by absolute page number again, 0 at the pages of other shards.

    It is what `token_slots` wants: new tokens then go to the shard that has their page, and others drop them.
    """
    number = jnp.arange(shard_table.shape[1] * shards, dtype=jnp.int32)
    return jnp.where(number % shards == shard, jnp.repeat(shard_table, shards, axis=1), 0)


def own_lengths(lengths: Int[Array, "B"], page_size: int, shard: Int[Array, ""] | int, shards: int) -> Int[Array, "B"]:
    """How many of the first `lengths` tokens of each sequence lie on a shard."""
    cycle = page_size * shards
    return lengths // cycle * page_size + jnp.clip(lengths % cycle - shard * page_size, 0, page_size)


def context_paged_attention(
    q: Float[Array, "B N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    shard_table: Int[Array, "B shard_pages"],
    lengths: Int[Array, "B"],
    *,
    axis_name: str,
    scale: float | None = None,
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    value_width: int | None = None,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "B N Hv"]:
    """`paged_attention` of the last token of each sequence over pages spread across `axis_name`; inside shard_map.

    A token that is the last sees every key, so the shard's own pages stand for a shorter sequence whose last token the
    query is, and the shards' results merge by log-sum-exp. Every shard gets the result.

    Args:
      q: one query per sequence, the same on every shard.
      k_pages, v_pages: this shard's pools, new keys written already.
      shard_table: this shard's part of `split_page_table`.
      lengths: tokens of each whole sequence.
      scale, k_scale, v_scale, value_width, implementation, interpret: as for `paged_attention`.
    """
    mine = own_lengths(lengths, k_pages.shape[1], lax.axis_index(axis_name), lax.axis_size(axis_name))
    out, lse = paged_attention(
        q,
        k_pages,
        v_pages,
        shard_table,
        jnp.arange(q.shape[0] + 1, dtype=jnp.int32),
        mine,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        value_width=value_width,
        return_lse=True,
        implementation=implementation,
        interpret=interpret,
    )
    return merge_partial(out, lse, axis_name)[0]
