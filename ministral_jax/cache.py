"""The paged key/value cache as a pytree, what one call asks of it, and its size. Who owns a page, the caller decides.

Layers with the same window form a group and share page tables. Each layer has its own pools, so that a donated cache is
updated in place. Page 0 of every pool is the null page: never allocated, never read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import target
from pallas_kernels.paged_attention import token_slots
from pallas_kernels.reference import token_positions

from .config import ModelConfig, Window
from .sharding.layout import Layout

TPU_LANES = 128


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["group_of_layer"])
@dataclass(frozen=True)
class PagedCache:
    """Pools of pages, one pair per layer; with latent attention one alone, of what keys and values are made from.

    An entry of that is a row of numbers, without an axis for heads.
    """

    keys: tuple[Float[Array, "_ page *entry"], ...]
    values: tuple[Float[Array, "_ page K H"] | None, ...]
    group_of_layer: tuple[int, ...]

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]

    @property
    def n_bytes(self) -> int:
        """Bytes of all pools as allocated."""
        return sum(pool.nbytes for pool in (*self.keys, *self.values) if pool is not None)

    @property
    def pages_by_group(self) -> tuple[int, ...]:
        """Pages in each pool of every group, the null page included."""
        groups = range(max(self.group_of_layer) + 1)
        return tuple(self.keys[self.group_of_layer.index(group)].shape[0] for group in groups)

    def with_layer(self, layer: int, k_pages: Array, v_pages: Array | None) -> PagedCache:
        """The cache with one layer's pools replaced."""
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], k_pages, *self.keys[layer + 1 :]),
            values=(*self.values[:layer], v_pages, *self.values[layer + 1 :]),
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["page_tables", "query_starts", "lengths"], meta_fields=[]
)
@dataclass(frozen=True)
class PagedBatch:
    """Which tokens one call brings: `query_starts` and `lengths` as in paged_attention, and a page table per group.

    On a mesh, the batches of the data shards stand one after the other, each with its own `query_starts` and pages
    numbered from its own null page.
    """

    page_tables: tuple[Int[Array, "B pages"], ...]
    query_starts: Int[Array, "B_plus_1"]
    lengths: Int[Array, "B"]

    def positions(self, n_tokens: int) -> Int[Array, "T"]:
        """Absolute position of each packed row; 0 for padding rows."""
        return jnp.maximum(token_positions(self.query_starts, self.lengths, n_tokens)[1], 0)

    def slots(self, pages_by_group: Sequence[int], page_size: int, n_tokens: int) -> tuple[Int[Array, "T"], ...]:
        """Per group, where each packed row is written in pools of so many pages."""
        return tuple(
            token_slots(table, self.query_starts, self.lengths, n_tokens, page_size, n_pages)
            for table, n_pages in zip(self.page_tables, pages_by_group, strict=True)
        )


@dataclass(frozen=True)
class GroupPlan:
    """Pages that one group of layers needs: `pages_per_sequence` while a sequence runs, `pages` in each pool.

    A group with full attention has a pool for each of `context` shards, which hold the pages of a sequence in turn.
    """

    window: Window
    layers: tuple[int, ...]
    pages_per_sequence: int
    pages: int
    n_bytes: int
    context: int = 1


@dataclass(frozen=True)
class CachePlan:
    """Size of a cache for `batch` sequences of up to `length` tokens that grow by at most `chunk` tokens a call.

    On a mesh it is that of one data shard, over all devices that share the shard's heads and pages.
    """

    groups: tuple[GroupPlan, ...]
    page_size: int
    length: int

    @property
    def table_width(self) -> int:
        """Entries of a page table, by absolute page number."""
        return -(-self.length // self.page_size)

    @property
    def n_bytes(self) -> int:
        return sum(group.n_bytes for group in self.groups)


def pages_held(length: int, window: Window, chunk: int, page_size: int) -> int:
    """Most pages a sequence holds at once.

    A call that adds `chunk` tokens needs the `window - 1` keys before its first one and the chunk itself. That run of
    tokens may begin at the last place of a page, which costs one page more than its length in pages.
    """
    all_pages = -(-length // page_size)
    if window is None:
        return all_pages
    run = window - 1 + chunk
    return min(all_pages, (run + page_size - 2) // page_size + 1)


def cached_numbers(config: ModelConfig) -> int:
    """Numbers that one layer keeps of one token: a latent and the rotated key, or a key and a value of each head."""
    if config.latent:
        return config.latent.kv_rank + config.latent.rope_head_dim
    return 2 * config.n_kv_heads * config.head_dim


def entry_numbers(config: ModelConfig, platform: str) -> int:
    """`cached_numbers` as pools are allocated: a TPU keeps rows of 128 numbers, so latents are filled up to whole ones.

    For another width the layout that a TPU gives to arguments is one that attention cannot read from, since it pads
    less, and a call would copy every pool twice.
    """
    numbers = cached_numbers(config)
    return -(-numbers // TPU_LANES) * TPU_LANES if config.latent and platform == "tpu" else numbers


def plan_cache(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    chunk: int,
    page_size: int,
    dtype: jnp.dtype,
    layout: Layout | None = None,
    platform: str | None = None,
) -> CachePlan:
    """The plan for `batch` sequences of up to `length` tokens, a data shard's; a null page is added to every pool.

    `platform` is that of the devices, by default as the layout has it, or jax.
    """
    numbers = entry_numbers(config, platform or _platform(layout))
    page_bytes = page_size * _kept_copies(config, layout) * numbers * jnp.dtype(dtype).itemsize
    groups = []
    for window, layers in config.window_groups:
        held = pages_held(length, window, chunk, page_size)
        context = layout.ways("sequence") if layout is not None and window is None else 1
        pages = batch * -(-held // context) + 1
        n_bytes = context * pages * page_bytes * len(layers)
        groups.append(GroupPlan(window, layers, held, pages, n_bytes, context))
    return CachePlan(tuple(groups), page_size, length)


def _kept_copies(config: ModelConfig, layout: Layout | None) -> int:
    """How often each key head is kept: more than once where there are fewer than the devices that share them."""
    return 1 if layout is None or config.latent else max(1, layout.ways("act_kv_heads") // config.n_kv_heads)


def _platform(layout: Layout | None) -> str:
    """Of the devices that a cache is for."""
    return (layout and layout.platform) or target().platform


def allocate_cache(config: ModelConfig, plan: CachePlan, dtype: jnp.dtype, layout: Layout | None = None) -> PagedCache:
    """Pools as planned, on a mesh each device's part made where it stays. Their contents mean nothing until written."""
    group_of_layer = [0] * config.n_layers
    for i, group in enumerate(plan.groups):
        for layer in group.layers:
            group_of_layer[layer] = i
    heads = config.n_kv_heads * _kept_copies(config, layout)
    entry = (entry_numbers(config, _platform(layout)),) if config.latent else (heads, config.head_dim)

    def pool(layer: int) -> Array:
        group = plan.groups[group_of_layer[layer]]
        if layout is None:
            return jnp.zeros((group.pages, plan.page_size, *entry), dtype)
        axes = pool_axes(config, group.window)
        shape = (group.pages * layout.ways(axes[0]), plan.page_size, *entry)
        return jnp.zeros(shape, dtype, device=layout.sharding(axes))

    return PagedCache(
        keys=tuple(pool(layer) for layer in range(config.n_layers)),
        values=tuple(None if config.latent else pool(layer) for layer in range(config.n_layers)),
        group_of_layer=tuple(group_of_layer),
    )


def pool_axes(config: ModelConfig, window: Window) -> tuple[str, *tuple[str | None, ...]]:
    """Logical axes of a pool. Only the pages of full attention are worth splitting over `context`."""
    pages = "pages" if window is not None else "split_pages"
    return (pages, None, None) if config.latent else (pages, None, "act_kv_heads", None)
