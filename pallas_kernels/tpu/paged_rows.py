"""Paged attention of few queries, as in decoding: the rows of a tile down, the entries of a block of pages across.

With few queries the matrix unit has time to spare, the layout of memory has not: a page [page, K, H] read as a matrix
has the K heads of a token in consecutive rows. All query heads are multiplied with all of them, and scores against the
entries of other heads are masked. No head is ever picked out of a page. Not for prompts: see paged_lanes.py.
"""

from __future__ import annotations

import functools
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

# Columns of the array of row constants.
K_FACTOR, V_FACTOR, TOKEN, HEAD = range(4)


def row_constants(
    call: PagedCall, k_factor: Float[Array, "K"], v_factor: Float[Array, "K"]
) -> Float[Array, "U rows 4"]:
    """What belongs to each row: the factors of its key head, its token within the tile, its key head in the unit."""
    U, G, tile = call.units, call.groups, call.tile
    head = jnp.arange(call.kv_heads * G, dtype=jnp.int32).reshape(U, 1, -1) // G
    token = jnp.arange(tile, dtype=jnp.float32)[None, :, None]
    columns = (k_factor[head], v_factor[head], token, (head % call.heads_per_unit).astype(jnp.float32))
    shape = (U, tile, head.shape[-1])
    return jnp.stack([jnp.broadcast_to(x, shape) for x in columns], axis=-1).reshape(U, -1, len(columns))


class Rows(NamedTuple):
    """The references of one grid step, and what is done with a block of pages."""

    call: PagedCall
    seen: Seen
    constants: Any  # [U, rows, 4]
    buffers: tuple[Any, Any]  # [2, pages_per_block, ...]
    q: Any  # [U, rows, H]
    acc: Any  # [U, rows, Hv]
    top: Any  # [U, rows, 1]
    total: Any  # [U, rows, 1]

    @staticmethod
    def scratch(call: PagedCall, H: int, Hv: int, dtype: Any) -> list[Any]:
        """Shapes of the scratch, from `q` on."""
        shape = (call.units, call.rows)
        return [pltpu.VMEM((*shape, H), dtype), *[pltpu.VMEM((*shape, width), jnp.float32) for width in (Hv, 1, 1)]]

    def start(self, queries: Any) -> None:
        """Before the first block. `queries` [tile, N, H] are laid out by units."""
        heads = self.call.groups * self.call.heads_per_unit
        for unit in range(self.call.units):
            self.q[unit] = queries[:, unit * heads : (unit + 1) * heads, :].reshape(self.call.rows, -1)
        self.acc[...] = jnp.zeros(self.acc.shape, self.acc.dtype)
        self.top[...] = jnp.full(self.top.shape, LOWEST_TOP, self.top.dtype)
        self.total[...] = jnp.zeros(self.total.shape, self.total.dtype)

    def block(self, block: Array, slot: Array, masked: bool) -> None:
        """Takes the keys and values of a block in: all its scores first, so that nothing waits for a maximum."""
        starts = range(0, self.call.paging.block, self.call.chunk)
        for unit in range(self.call.units):
            scores = [self._scores(block, slot, start, unit, masked) for start in starts]  # [rows, entries] each
            top = self.top[unit]  # [rows, 1]
            new_top = functools.reduce(jnp.maximum, [top, *(x.max(axis=1, keepdims=True) for x in scores)])
            weights = [jnp.exp2(x - new_top) for x in scores]
            values = [self._values(block, slot, start, unit, masked) for start in starts]  # [entries, Hv] each
            decay = jnp.exp2(top - new_top)
            self.top[unit] = new_top
            self.total[unit] = self.total[unit] * decay + sum(x.sum(axis=1, keepdims=True) for x in weights)
            mixed = sum(dot(x.astype(y.dtype), y, (1, 0)) for x, y in zip(weights, values, strict=True))
            self.acc[unit] = self.acc[unit] * decay + mixed

    def finish(self, out: Any, lse: Any) -> None:
        """After the last block: the results of the tile, `out` [tile, N, Hv] and `lse` [tile, 1, N]."""
        heads = self.call.groups * self.call.heads_per_unit
        for unit in range(self.call.units):
            total = self.total[unit]
            seen = total > 0
            factor = self._constant(unit, V_FACTOR) / jnp.where(seen, total, 1.0)
            mixed = (self.acc[unit] * factor).astype(out.dtype)  # [rows, Hv]
            sums = jnp.where(seen, (self.top[unit] + jnp.log2(total)) / LOG2_E, -jnp.inf).T  # [1, rows]
            for token in range(self.call.tile):
                rows, of_unit = slice(token * heads, (token + 1) * heads), slice(unit * heads, (unit + 1) * heads)
                out[token, of_unit, :] = mixed[rows]
                lse[token, :, of_unit] = sums[:, rows]

    def _constant(self, unit: int, column: int) -> Float[Array, "rows 1"]:
        return self.constants[unit][:, column : column + 1]

    def _scores(self, block: Array, slot: Array, start: int, unit: int, masked: bool) -> Float[Array, "rows entries"]:
        """Entries are counted where positions would be divided: a window of W keys is one of W * n entries."""
        keys, n = self._entries(self.buffers[0], slot, unit, start), self.call.heads_per_unit
        scores = dot(self.q[unit], keys, (1, 1)) * self._constant(unit, K_FACTOR)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, keys.shape[0]), 1)
        if n > 1:
            own = jax.lax.rem(column, jnp.int32(n)) == self._constant(unit, HEAD).astype(jnp.int32)
            scores = jnp.where(own, scores, -jnp.inf)
        if masked:
            first, window = self.seen.first - self._base(block, start), self.call.paging.window
            query = (first + self._constant(unit, TOKEN).astype(jnp.int32)) * n + (n - 1)  # its last entry
            mask = visible(query, column, None if window is None else window * n)
            scores = jnp.where(mask, scores, -jnp.inf)
        return scores

    def _values(self, block: Array, slot: Array, start: int, unit: int, masked: bool) -> Float[Array, "entries Hv"]:
        """Values, zero where no row sees them, since they may be NaN there."""
        values, n = self._entries(self.buffers[1], slot, unit, start), self.call.heads_per_unit
        if not masked:
            return values
        row, base = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0), self._base(block, start)
        return zeroed_outside(values, row, (self.seen.oldest - base) * n, (self.seen.last - base) * n + (n - 1))

    def _base(self, block: Array, start: int) -> Array:
        return block * self.call.paging.block + start

    def _entries(self, buffer: Any, slot: Array, unit: int, start: int) -> Num[Array, "entries width"]:
        """Keys or values of one unit: `chunk` tokens from `start` on, the heads of a token one after the other."""
        call, width = self.call, buffer.shape[-1]
        block, K, page = call.paging.block, call.kv_heads, call.paging.page
        if call.head_major:
            found = buffer[slot, pl.ds(start // page, call.chunk // page), unit].reshape(call.chunk, width)
        elif isinstance(call.interpret, pltpu.InterpretParams):  # knows no reshaped references
            found = buffer[slot].reshape(block * K, width)[start * K : (start + call.chunk) * K]
        else:
            found = buffer.reshape(2 * block * K, width)[pl.ds((slot * block + start) * K, call.chunk * K), :]
        return found.astype(self.q.dtype)
