"""Windowed attention of split sequences: each shard fetches the keys just before its own, and no others.

A window of W reaches W - 1 keys back: that many rows are fetched, over several hops where a run of tokens is shorter,
from the last hop only the rows that are needed. One call of `flash_attention` then serves each run.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import flash_attention

from .chunks import Chunks

Tree = TypeVar("Tree")


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
    slots, own = range(chunks.per_shard), (k, v, segment_ids)
    halos = [halo_rows(chunks, slot, window) for slot in slots]
    fetched = [
        jax.tree.map(functools.partial(_fetched, chunks, slot=slot, halo=halo), own)
        for slot, halo in zip(slots, halos, strict=True)
    ]
    q, fetched = _meanwhile(q, fetched)
    outs = []
    for slot, halo in zip(slots, halos, strict=True):
        missing = missing_rows(chunks, slot, halo)
        at = slice(slot * chunks.length, (slot + 1) * chunks.length)
        join = functools.partial(_joined, missing=missing)
        keys, values, ids = jax.tree.map(lambda x, before, at=at, join=join: join(before, x[:, at]), own, fetched[slot])
        outs.append(
            flash_attention(
                q[:, at],
                keys,
                values,
                window=window,
                segment_ids=None if segment_ids is None else (segment_ids[:, at], ids),
                query_offset=halo - missing,
                **options,
            )
        )
    return jnp.concatenate(outs, axis=1)


@jax.custom_vjp
def _meanwhile(q: Array, transfers: Tree) -> tuple[Array, Tree]:
    """Both, neither used before all is there: the projection of the queries is the time that transfers get.

    Gradients are not held up: those of a halo are sent while that of the queries is computed.
    """
    return lax.optimization_barrier((q, transfers))


_meanwhile.defvjp(lambda q, transfers: (_meanwhile(q, transfers), None), lambda _, gradients: gradients)


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


def _joined(
    before: list[Shaped[Array, "B _ *rest"]], own: Shaped[Array, "B run *rest"], missing: Int[Array, ""] | int
) -> Shaped[Array, "B halo_and_run *rest"]:
    """A halo and the run after it.

    Rows from before the beginning of the sequence are not there: the others move up, and what fills the end stands
    after the last query, where none looks.
    """
    whole = jnp.concatenate([*before, own], axis=1)
    if isinstance(missing, int):
        return whole
    room = jnp.zeros((own.shape[0], whole.shape[1] - own.shape[1], *own.shape[2:]), own.dtype)
    return lax.dynamic_slice_in_dim(jnp.concatenate([whole, room], axis=1), missing, whole.shape[1], axis=1)


def _fetched(chunks: Chunks, x: Shaped[Array, "B T *rest"], slot: int, halo: int) -> list[Shaped[Array, "B _ *rest"]]:
    """The `halo` rows of `x` before the run in `slot`, a piece per hop, farthest first."""
    length = chunks.length
    hops = range(-(-halo // length), 0, -1)
    return [_from_hop(chunks, x, slot, hop, min(length, halo - (hop - 1) * length)) for hop in hops]


def _from_hop(
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
