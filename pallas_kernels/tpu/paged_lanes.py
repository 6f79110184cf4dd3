"""Paged attention of many queries, as in a prompt: keys down, queries along the lanes, one key head at a time.

Each block of pages is first laid out by heads in vector memory. From there on it is the flash kernel's loop: the heads
that share a key head are computed in units of `lanes` queries. Not for decoding: see paged_rows.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Num

from ..visibility import visible
from .flash_forward import LOWEST_TOP
from .paged_call import PagedCall, Seen, zeroed_outside
from .tiles import LOG2_E, dot

# Units whose scores are asked of the matrix unit before the softmax of the current one: it then works during softmax.
UNITS_AHEAD = 2
# Queries or results whose heads and tokens change places at once: what the registers hold.
TOKENS_TURNED = 32


class Lanes(NamedTuple):
    """The references of one grid step, and what is done with a block of pages."""

    call: PagedCall
    seen: Seen
    constants: Any  # SMEM [2, K]: factors of scores and of values
    buffers: tuple[Any, Any]  # [2, pages_per_block, ...]
    q: Any  # [N, tile, H]
    mixed: Any  # [N, tile, Hv]
    sums: Any  # [N, tile]
    acc: Any  # [K, G, Hv, tile]
    top: Any  # [K, G, 1, tile]
    total: Any  # [K, G, 1, tile]
    keys: Any  # [K, block, H]
    values: Any  # [K, Hv, block]

    @staticmethod
    def scratch(call: PagedCall, H: int, Hv: int, dtype: Any) -> list[Any]:
        """Shapes of the scratch, from `q` on."""
        K, N, block, tile = call.kv_heads, call.kv_heads * call.groups, call.paging.block, call.tile
        return [
            pltpu.VMEM((N, tile, H), dtype),
            pltpu.VMEM((N, tile, Hv), dtype),
            pltpu.VMEM((N, tile), jnp.float32),
            *[pltpu.VMEM((K, call.groups, rows, tile), jnp.float32) for rows in (Hv, 1, 1)],
            pltpu.VMEM((K, block, H), dtype),
            pltpu.VMEM((K, Hv, block), dtype),
        ]

    def start(self, queries: Any) -> None:
        """Before the first block. `queries` [tile, N, H] are laid out by heads."""
        for start in range(0, self.call.tile, TOKENS_TURNED):
            tokens = slice(start, start + TOKENS_TURNED)
            self.q[:, tokens, :] = queries[tokens].swapaxes(0, 1)

        @pl.loop(0, self.call.kv_heads)
        def _head(u: Array) -> None:
            self.acc[u] = jnp.zeros(self.acc.shape[1:], self.acc.dtype)
            self.top[u] = jnp.full(self.top.shape[1:], LOWEST_TOP, self.top.dtype)
            self.total[u] = jnp.zeros(self.total.shape[1:], self.total.dtype)

    def block(self, block: Array, slot: Array, masked: bool) -> None:
        """Takes the keys and values of a block in."""
        base = block * self.call.paging.block
        for start in range(0, self.call.paging.block, self.call.chunk):
            self._lay_out(base + start, slot, start, masked)

        @pl.loop(0, self.call.kv_heads)
        def _head(u: Array) -> None:
            self._head(u, base, masked)

    def finish(self, out: Any, lse: Any) -> None:
        """After the last block: the results of the tile, `out` [tile, N, Hv] and `lse` [tile, 1, N]."""
        groups = self.call.groups

        @pl.loop(0, self.call.kv_heads)
        def _head(u: Array) -> None:
            for g in range(groups):
                total = self.total[u, g]  # [1, tile]
                seen = total > 0
                mixed = self.acc[u, g] * (self.constants[1, u] / jnp.where(seen, total, 1.0))  # [Hv, tile]
                self.mixed[u * groups + g] = mixed.T.astype(out.dtype)
                sums = jnp.where(seen, (self.top[u, g] + jnp.log2(total)) / LOG2_E, -jnp.inf)
                self.sums[pl.ds(u * groups + g, 1), :] = sums

        for start in range(0, self.call.tile, TOKENS_TURNED):
            tokens = slice(start, start + TOKENS_TURNED)
            out[tokens] = self.mixed[:, tokens, :].swapaxes(0, 1)
        lse[:, 0, :] = self.sums[...].T

    def _lay_out(self, base: Array, slot: Array, start: int, masked: bool) -> None:
        """Copies a chunk of tokens to `keys` and `values`, head by head; values nobody sees become zero."""
        tokens = slice(start, start + self.call.chunk)
        keys, values = (self._by_head(buffer, slot, start) for buffer in self.buffers)  # [K, chunk, width]
        if masked:
            at = base + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values = zeroed_outside(values, at, self.seen.oldest, self.seen.last)
        self.keys[:, tokens, :] = keys
        for u in range(self.call.kv_heads):
            self.values[u, :, tokens] = values[u].T

    def _by_head(self, buffer: Any, slot: Array, start: int) -> Num[Array, "K chunk width"]:
        call, page = self.call, self.call.paging.page
        found = buffer[slot, pl.ds(start // page, call.chunk // page)]
        if call.head_major:
            found = found.swapaxes(0, 1).reshape(call.kv_heads, call.chunk, -1)
        else:
            found = found.reshape(call.chunk, call.kv_heads, -1).swapaxes(0, 1)
        return found.astype(self.q.dtype)

    def _head(self, u: Array, base: Array, masked: bool) -> None:
        call = self.call
        keys, values, factor = self.keys[u], self.values[u], self.constants[0, u]  # [block, H], [Hv, block]
        starts = range(0, call.tile, call.lanes)
        masks = {start: self._mask(base, start) if masked else None for start in starts}

        def scores_of(g: int, start: int) -> Float[Array, "block lanes"]:
            product = dot(keys, self.q[u * call.groups + g, start : start + call.lanes, :], (1, 1)) * factor
            mask = masks[start]
            return product if mask is None else jnp.where(mask, product, -jnp.inf)

        units = [(g, start) for g in range(call.groups) for start in starts]
        ready = [scores_of(*unit) for unit in units[:UNITS_AHEAD]]
        for n, (g, start) in enumerate(units):
            if n + UNITS_AHEAD < len(units):
                ready.append(scores_of(*units[n + UNITS_AHEAD]))
            at = (u, g, slice(None), slice(start, start + call.lanes))
            scores, top = ready.pop(0), self.top[at]  # [block, lanes], [1, lanes]
            new_top = jnp.maximum(top, scores.max(axis=0, keepdims=True))
            weights = jnp.exp2(scores - new_top)
            decay = jnp.exp2(top - new_top)
            mixed = dot(values, weights.astype(values.dtype), (1, 0))  # [Hv, lanes]
            self.top[at] = new_top
            self.total[at] = self.total[at] * decay + weights.sum(axis=0, keepdims=True)
            self.acc[at] = self.acc[at] * decay + mixed

    def _mask(self, base: Array, start: int) -> Array:
        shape = (self.call.paging.block, self.call.lanes)
        key = base + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query = self.seen.first + start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return visible(query, key, self.call.paging.window)
