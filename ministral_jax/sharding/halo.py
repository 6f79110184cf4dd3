"""Windowed attention of split sequences: each shard fetches the keys just before its own, and no others.

A window of W reaches W - 1 keys back: that many rows are fetched, over several hops where a run of tokens is shorter,
from the last hop only the rows that are needed. One call of `flash_attention` then serves each run.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import flash_attention

from .chunks import Chunks


def halo_attention(
    chunks: Chunks,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segment_ids: Int[Array, "B T"] | None,
    window: int,
    options: dict[str, Any],
) -> Float[Array, "B T N Hv"]:
    """This shard's attention to its own keys and the halo before them. `options` go to `flash_attention`."""
    outs = []
    for slot in range(chunks.per_shard):
        at = slice(slot * chunks.length, (slot + 1) * chunks.length)
        halo = halo_rows(chunks, slot, window)
        missing = missing_rows(chunks, slot, halo)
        keys, values = (with_halo(chunks, x, slot, halo, missing) for x in (k, v))  # [B, halo + run, K, H]
        ids = None
        if segment_ids is not None:
            ids = segment_ids[:, at], with_halo(chunks, segment_ids, slot, halo, missing)
        outs.append(
            flash_attention(
                q[:, at], keys, values, window=window, segment_ids=ids, query_offset=halo - missing, **options
            )
        )
    return jnp.concatenate(outs, axis=1)


def halo_rows(chunks: Chunks, slot: int, window: int) -> int:
    """Keys that the runs in `slot` need from before them: those that their first tokens see, where there are any."""
    return min(window - 1, max(_numbers(chunks, slot)) * chunks.length)


def missing_rows(chunks: Chunks, slot: int, halo: int) -> Int[Array, ""] | int:
    """How many of them lie before the beginning of the sequence: 0 but on the first shards."""
    if halo <= min(_numbers(chunks, slot)) * chunks.length:
        return 0
    return jnp.maximum(halo - chunks.number(slot) * chunks.length, 0)


def _numbers(chunks: Chunks, slot: int) -> list[int]:
    return [chunks.at(shard, slot) for shard in range(chunks.shards)]


def with_halo(
    chunks: Chunks, x: Shaped[Array, "B T *rest"], slot: int, halo: int, missing: Int[Array, ""] | int
) -> Shaped[Array, "B halo_and_run *rest"]:
    """The `halo` rows of `x` before the run in `slot`, from the shards that hold them, and the run itself.

    Rows from before the beginning of the sequence are not there: the others move up, and what fills the end stands
    after the last query, where none looks.
    """
    length = chunks.length
    own = x[:, slot * length : (slot + 1) * length]
    if not halo:
        return own
    hops = -(-halo // length)
    rows = {hop: length if hop < hops else halo - (hops - 1) * length for hop in range(1, hops + 1)}
    pieces = [_fetched(chunks, x, slot, hop, rows[hop]) for hop in range(hops, 0, -1)]
    whole = jnp.concatenate([*pieces, own], axis=1)
    if isinstance(missing, int):
        return whole
    room = jnp.zeros((x.shape[0], halo, *x.shape[2:]), x.dtype)
    return lax.dynamic_slice_in_dim(jnp.concatenate([whole, room], axis=1), missing, halo + length, axis=1)


def _fetched(
    chunks: Chunks, x: Shaped[Array, "B T *rest"], slot: int, hop: int, rows: int
) -> Shaped[Array, "B rows *rest"]:
    """The last `rows` of the run that is `hop` before the one in `slot`; zeros where there is none."""
    pieces = []
    for source_slot, pairs in chunks.routes(slot, hop).items():
        end = (source_slot + 1) * chunks.length
        tail = x[:, end - rows : end]
        if any(source != target for source, target in pairs):
            pieces.append(lax.ppermute(tail, chunks.axis_name, pairs))
        else:  # a shard whose two runs are neighbours
            here = sum(lax.axis_index(chunks.axis_name) == source for source, _ in pairs) > 0
            pieces.append(jnp.where(here, tail, 0))
    # Each shard gets one of them; where a permutation sends nothing, it gives zeros.
    return sum(pieces[1:], pieces[0])
