"""How queries meet keys: over the sequence at hand, or through the paged cache; on one device or on a mesh.

Each function here makes the `attend` that a layer is handed (`attention.Attend`). On a mesh, the kernels run inside
shard_map: every device sees its own sequences and its own heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import flash_attention, paged_attention, write_pages
from pallas_kernels.flash_attention import Implementation
from pallas_kernels.paged_attention import Implementation as PagedImplementation
from pallas_kernels.paged_attention import token_slots
from pallas_kernels.reference import token_positions

from .attention import Attend
from .cache import PagedBatch, PagedCache, pool_axes
from .config import ModelConfig, Window
from .sharding.context import context_flash_attention
from .sharding.context_pages import context_paged_attention, own_page_table
from .sharding.layout import Layout, sequence_axes

KEYS = ("act_kv_heads", None)
LATENTS = (None, None)  # one key for all heads, on every device that has any of them
QUERIES = ("act_heads", None)


def causal_attend(
    config: ModelConfig, segment_ids: Int[Array, "B T"] | None, implementation: Implementation, layout: Layout | None
) -> Attend[None]:
    """Attention of whole sequences to themselves, windowed as each layer says."""

    def attend(layer: int, q: Array, k: Array, v: Array | None, memory: None) -> tuple[Array, None]:
        assert v is not None, "latents are attended to through a cache"
        window = config.windows[layer]
        if layout is None:
            out = flash_attention(q, k, v, window=window, segment_ids=segment_ids, implementation=implementation)
        else:
            out = _causal_on_mesh(q, k, v, segment_ids, window, implementation, layout)
        return out, memory

    return attend


def _causal_on_mesh(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segment_ids: Int[Array, "B T"] | None,
    window: Window,
    implementation: Implementation,
    layout: Layout,
) -> Float[Array, "B T N Hv"]:
    rows = sequence_axes(q.shape[:2], layout)
    options: dict[str, Any] = {"window": window, "implementation": implementation}
    across: Callable[..., Array] = flash_attention
    if layout.ways("sequence") > 1:
        across = functools.partial(context_flash_attention, axis_name="context")

    def local(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        return across(q, k, v, segment_ids=segments, **options)

    keys = layout.spec((*rows, *KEYS))
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec((*rows, *QUERIES)), keys, keys, layout.spec(rows)),
        out_specs=layout.spec((*rows, *QUERIES)),
        check_vma=False,
    )(q, repeat_heads(k, layout), repeat_heads(v, layout), segment_ids)


def repeat_heads(x: Float[Array, "*T K H"], layout: Layout) -> Float[Array, "*T K_or_more H"]:
    """Key heads as many as the devices that share them, each beside its copies, where there are fewer."""
    ways = layout.ways("act_kv_heads")
    return x if ways <= x.shape[-2] else jnp.repeat(x, ways // x.shape[-2], axis=-2)


def paged_attend(
    config: ModelConfig,
    batch: PagedBatch,
    cache: PagedCache,
    n_tokens: int,
    implementation: PagedImplementation,
    layout: Layout | None,
) -> Attend[PagedCache]:
    """Attention of packed new tokens through the cache, which they are written to first.

    With latent attention k is what the cache keeps, `v` None, and q the queries that meet it (see latent_attention).
    """
    options: dict[str, Any] = {"implementation": implementation}
    if config.latent:
        options |= {"value_width": config.latent.kv_rank, "scale": config.head_dim**-0.5}
    if layout is None:
        slots = batch.slots(cache.pages_by_group, cache.page_size, n_tokens)
    else:
        slots = _slots_on_mesh(batch, cache, n_tokens, layout)

    def attend(layer: int, q: Array, k: Array, v: Array | None, memory: PagedCache) -> tuple[Array, PagedCache]:
        group, window = memory.group_of_layer[layer], config.windows[layer]
        pools = (memory.keys[layer], memory.values[layer])
        where = (slots[group], batch.page_tables[group], batch.query_starts, batch.lengths)
        local = functools.partial(_write_and_attend, window=window, options=options)
        if layout is None:
            out, k_pages, v_pages = local(q, k, v, *pools, *where)
        else:
            if v is not None:
                k, v = repeat_heads(k, layout), repeat_heads(v, layout)
            if is_split(window, layout):
                local, where = functools.partial(_write_and_attend_split, options=options), where[1:]
            out, k_pages, v_pages = _paged_on_mesh(local, config, window, layout)(q, k, v, pools, where)
        return out, memory.with_layer(layer, k_pages, v_pages)

    return attend


def _write_and_attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"] | None,
    k_pages: Array,
    v_pages: Array | None,
    slots: Int[Array, "T"],
    *where: Array,
    window: Window,
    options: dict[str, Any],
) -> tuple[Array, Array, Array | None]:
    """Attention of new tokens after writing them at `slots`; `where` is table, query starts and lengths."""
    q, k = _filled_up(q, k_pages), _filled_up(k, k_pages)
    keys = write_pages(_with_heads(k_pages), k, slots)
    v_pages = None if v is None or v_pages is None else write_pages(v_pages, v, slots)
    return paged_attention(q, keys, v_pages, *where, window=window, **options), keys.reshape(k_pages.shape), v_pages


def _with_heads(pool: Num[Array, "_ page *entry"]) -> Num[Array, "_ page K H"]:
    """A pool as attention takes it: latents as one key head, the same bytes in the same order."""
    return pool if pool.ndim == 4 else pool[:, :, None]


def _filled_up(x: Float[Array, "T heads H"], pool: Num[Array, "_ page *entry"]) -> Float[Array, "T heads entry"]:
    """Queries or keys with zeros behind them, as wide as the entries of the pool: products stay what they are."""
    missing = pool.shape[-1] - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x


def is_split(window: Window, layout: Layout) -> bool:
    """Whether a layer's pages are spread over the context shards: only without a window are they worth it."""
    return window is None and layout.ways("sequence") > 1


def _write_and_attend_split(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"] | None,
    k_pages: Array,
    v_pages: Array | None,
    table: Int[Array, "B shard_pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    options: dict[str, Any],
) -> tuple[Array, Array, Array | None]:
    """The same where this shard has every C-th page. Each row counts as a sequence that ends with it, so that what it
    sees on a shard is a run of tokens: exact, though the rows of a prompt's chunk read their keys one by one."""
    whole = own_page_table(table, lax.axis_index("context"), lax.axis_size("context"))
    slots = token_slots(whole, query_starts, lengths, q.shape[0], k_pages.shape[1], k_pages.shape[0])
    q, k = _filled_up(q, k_pages), _filled_up(k, k_pages)
    keys = write_pages(_with_heads(k_pages), k, slots)
    v_pages = None if v is None or v_pages is None else write_pages(v_pages, v, slots)
    sequence, position = token_positions(query_starts, lengths, q.shape[0])
    rows = table[jnp.maximum(sequence, 0)]
    out = context_paged_attention(q, keys, v_pages, rows, position + 1, axis_name="context", **options)
    return out, keys.reshape(k_pages.shape), v_pages


def _paged_on_mesh(
    local: Callable[..., Any], config: ModelConfig, window: Window, layout: Layout
) -> Callable[..., tuple[Array, Array, Array | None]]:
    """`local` on every device's own sequences, pages and heads."""
    entry = LATENTS if config.latent else KEYS
    queries, keys, rows = (layout.spec(("rows", *axes)) for axes in (QUERIES, entry, ()))
    pages = layout.spec(pool_axes(config, window))
    table = layout.spec(("rows", "sequence")) if is_split(window, layout) else rows
    slots = () if is_split(window, layout) else (rows,)

    def unpacked(q: Array, k: Array, v: Array | None, pools: tuple[Any, ...], where: tuple[Array, ...]) -> Any:
        return local(q, k, v, *pools, *where)

    return jax.shard_map(
        unpacked,
        mesh=layout.mesh,
        in_specs=(queries, keys, keys, (pages, pages), (*slots, table, rows, rows)),
        out_specs=(queries, pages, pages),
        check_vma=False,
    )


def _slots_on_mesh(batch: PagedBatch, cache: PagedCache, n_tokens: int, layout: Layout) -> tuple[Array, ...]:
    """Where each packed row is written, in the pools of its own data shard; unused for groups that are split."""
    pages = [n_pages // layout.ways("pages") for n_pages in cache.pages_by_group]

    def local(batch: PagedBatch) -> tuple[Array, ...]:
        return batch.slots(pages, cache.page_size, n_tokens // layout.ways("rows"))

    return _over_rows(local, layout)(batch)


def packed_positions(batch: PagedBatch, n_tokens: int, layout: Layout | None) -> Int[Array, "T"]:
    """Absolute position of each packed row; 0 for padding rows."""
    if layout is None:
        return batch.positions(n_tokens)
    return _over_rows(lambda batch: batch.positions(n_tokens // layout.ways("rows")), layout)(batch)


def _over_rows(local: Callable[[PagedBatch], Any], layout: Layout) -> Callable[[PagedBatch], Any]:
    """`local` of each data shard's own batch."""
    rows = layout.spec(("rows",))
    return jax.shard_map(local, mesh=layout.mesh, in_specs=(rows,), out_specs=rows, check_vma=False)
