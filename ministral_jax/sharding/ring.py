"""Full causal attention of split sequences: keys and values go round the ring, queries stay. Forward and backward.

Ring attention (Liu et al. 2023, arXiv 2310.01889), one kernel call per visiting block. Every transfer is issued before
the attention that it can hide behind. What lies in the future of all queries of a shard is not computed: it is skipped
under a contiguous split, and never arises under zigzag, where each visit is half visible on every shard.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels import flash_attention, flash_attention_gradients
from pallas_kernels.flash_attention import Implementation

from .chunks import Chunks
from .merge import Partial, combined

Tree = TypeVar("Tree")


class RingSettings(NamedTuple):
    """What the program depends on besides array shapes: all static."""

    chunks: Chunks
    scale: float | None
    implementation: Implementation
    interpret: Any

    @property
    def options(self) -> dict[str, Any]:
        """Of the attention operations."""
        return {"scale": self.scale, "implementation": self.implementation, "interpret": self.interpret}


class Keys(NamedTuple):
    """What goes round: one shard's keys, values and segment ids."""

    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K Hv"]
    ids: Int[Array, "B T"] | None


class Rows(NamedTuple):
    """What stays, in the backward pass: the queries and what belongs to each."""

    q: Float[Array, "B T N H"]
    d_out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B T N"]
    delta: Float[Array, "B T N"]
    ids: Int[Array, "B T"] | None


class Gradients(NamedTuple):
    """Sums in float32, or one visit's terms of them. Those of the queries lie apart, one array for each run of them."""

    q: tuple[Float[Array, "B run N H"], ...]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K Hv"]


def ring_attention(
    settings: RingSettings,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T N Hv"]:
    """Causal attention of this shard's queries to the keys of all shards. Differentiable in q, k, v."""
    return cast(Any, _ring)(settings, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(settings: RingSettings, q: Array, k: Array, v: Array, ids: Array | None) -> Array:
    return _forward(settings, q, k, v, ids).out


def _forward(settings: RingSettings, q: Array, k: Array, v: Array, ids: Array | None) -> Partial:
    chunks, last = settings.chunks, settings.chunks.shards - 1
    visiting = _passed_on(chunks, Keys(k, v, ids))
    # The runs of a shard lie in order, so that its own keys are seen as those of one sequence are.
    own = Partial(*flash_attention(q, k, v, segment_ids=ids, return_lse=True, **settings.options))
    seen = tuple(combined(Partial(*run)) for run in zip(*(_runs(chunks, x) for x in own), strict=True))

    def visit(step: Array | int, visiting: Keys, seen: tuple[Partial, ...], following: Tree) -> tuple[Tree, Any]:
        parts, following = _attended(settings, step, q, ids, visiting, following)
        return following, tuple(combined(old, *new) for old, new in zip(seen, parts, strict=True))

    def turn(step: Array, carry: tuple[Keys, tuple[Partial, ...]]) -> tuple[Keys, tuple[Partial, ...]]:
        visiting, seen = carry
        return visit(step, visiting, seen, _passed_on(chunks, visiting))

    visiting, seen = lax.fori_loop(1, last, turn, (visiting, seen)) if last > 1 else (visiting, seen)
    _, seen = visit(last, visiting, seen, None)
    out, lse = (jnp.concatenate(runs, axis=1) for runs in zip(*seen, strict=True))
    return Partial(out.astype(q.dtype), lse)


def _forward_with_residuals(
    settings: RingSettings, q: Array, k: Array, v: Array, ids: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    out, lse = _forward(settings, q, k, v, ids)
    return out, (q, k, v, ids, out, lse)


def _backward(settings: RingSettings, residuals: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    q, k, v, ids, out, lse = residuals
    chunks, last = settings.chunks, settings.chunks.shards - 1
    own = Keys(k, v, ids)
    visiting = _passed_on(chunks, own)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B, T, N]
    rows = Rows(q, d_out, lse, delta, ids)
    dq, dk, dv = _local_gradients(settings, rows, own, 0)
    total = _wide(Gradients(_runs(chunks, dq), dk, dv))

    def visit(step: Array | int, visiting: Keys, total: Gradients, following: Tree) -> tuple[Tree, Gradients]:
        # The sums of the keys that visit come from the shard before, while this one computes its own terms.
        sums = _passed_on(chunks, (total.k, total.v), closed=True)
        terms, ((dk, dv), following) = _gradients(settings, step, rows, visiting, (sums, following))
        return following, jax.tree.map(jnp.add, Gradients(total.q, dk, dv), _wide(terms))

    def turn(step: Array, carry: tuple[Keys, Gradients]) -> tuple[Keys, Gradients]:
        visiting, total = carry
        return visit(step, visiting, total, _passed_on(chunks, visiting))

    visiting, total = lax.fori_loop(1, last, turn, (visiting, total)) if last > 1 else (visiting, total)
    _, total = visit(last, visiting, total, None)
    dk, dv = _passed_on(chunks, (total.k, total.v), closed=True)  # home
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), ids)
    return jnp.concatenate(total.q, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), no_gradient


_ring.defvjp(_forward_with_residuals, _backward)


def _passed_on(chunks: Chunks, tree: Tree, closed: bool = False) -> Tree:
    """Each shard's arrays, given to the next; from the last to the first only where the ring is closed.

    Under a contiguous split no shard looks at keys of later ones, so that their ring is open.
    """
    closed = closed or chunks.per_shard > 1
    pairs = [(shard, (shard + 1) % chunks.shards) for shard in range(chunks.shards if closed else chunks.shards - 1)]
    return jax.tree.map(lambda x: lax.ppermute(x, chunks.axis_name, pairs), tree)


def _meanwhile(results: Any, transfers: Tree) -> tuple[Any, Tree]:
    """Both, neither used before all is there: so that transfers get the time of the kernels, the longest there is."""
    return lax.optimization_barrier((results, transfers))


def _runs(chunks: Chunks, x: Shaped[Array, "B T *rest"]) -> tuple[Shaped[Array, "B run *rest"], ...]:
    return tuple(jnp.split(x, chunks.per_shard, axis=1))


def _wide(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _is_before(settings: RingSettings, step: Array | int) -> Bool[Array, ""]:
    """Whether the keys that visit at `step`, from that many shards back, are of an earlier shard than this."""
    return lax.axis_index(settings.chunks.axis_name) >= step


def _attended(
    settings: RingSettings, step: Array | int, q: Array, ids: Array | None, visiting: Keys, transfers: Tree
) -> tuple[list[list[Partial]], Tree]:
    """Attention to the keys that visit at a step: for each run of queries, the parts that it is to be combined with.

    `transfers` are under way meanwhile.
    """
    before, offset = _is_before(settings, step), settings.chunks.length  # an offset behind all keys

    def attend(q: Array, ids: Array | None, keys: Keys) -> Partial:
        options = {"segment_ids": _pair(ids, keys.ids), "query_offset": offset, **settings.options}
        return Partial(*flash_attention(q, keys.k, keys.v, return_lse=True, **options))

    if settings.chunks.per_shard == 1:
        rows, width = q.shape[:3], visiting.v.shape[-1]
        nothing = Partial(jnp.zeros((*rows, width), q.dtype), jnp.full(rows, -jnp.inf, jnp.float32))
        part = lax.cond(before, lambda: attend(q, ids, visiting), lambda: nothing)
        return _meanwhile([[part]], transfers)
    q, ids = jax.tree.map(functools.partial(_query_runs, before), (q, ids))
    parts = attend(q, ids, jax.tree.map(functools.partial(_key_runs, before), visiting))
    parts, transfers = _meanwhile(parts, transfers)
    first, second = _halves(parts)
    unseen = jnp.full_like(first.lse, -jnp.inf)
    early = first._replace(lse=jnp.where(before, first.lse, unseen))
    return [[early], [second, first._replace(lse=jnp.where(before, unseen, first.lse))]], transfers


def _gradients(
    settings: RingSettings, step: Array | int, rows: Rows, visiting: Keys, transfers: Tree
) -> tuple[Gradients, Tree]:
    """The terms of the keys that visit at a step. `transfers` are under way meanwhile."""
    before, offset = _is_before(settings, step), settings.chunks.length
    if settings.chunks.per_shard == 1:
        nothing = jax.tree.map(jnp.zeros_like, (rows.q, visiting.k, visiting.v))
        terms = lax.cond(before, lambda: _local_gradients(settings, rows, visiting, offset), lambda: nothing)
        (dq, dk, dv), transfers = _meanwhile(terms, transfers)
        return Gradients((dq,), dk, dv), transfers
    queries = jax.tree.map(functools.partial(_query_runs, before), rows)
    keys = jax.tree.map(functools.partial(_key_runs, before), visiting)
    terms, transfers = _meanwhile(_local_gradients(settings, queries, keys, offset), transfers)
    first, second = _halves(_wide(terms))
    # The sums over what _query_runs and _key_runs have taken out.
    if_before, if_after = (jax.tree.map(functools.partial(_only, where), first) for where in (before, ~before))
    dk, dv = (
        jnp.concatenate([early + other, late], axis=1)
        for early, late, other in zip(if_before[1:], if_after[1:], second[1:], strict=True)
    )
    return Gradients((if_before[0], if_after[0] + second[0]), dk, dv), transfers


def _local_gradients(settings: RingSettings, rows: Rows, keys: Keys, offset: int) -> tuple[Array, Array, Array]:
    operands = rows.q, keys.k, keys.v, rows.d_out, rows.lse, rows.delta
    return flash_attention_gradients(
        *operands, segment_ids=_pair(rows.ids, keys.ids), query_offset=offset, **settings.options
    )


def _pair(query_ids: Array | None, key_ids: Array | None) -> tuple[Array, Array] | None:
    return None if query_ids is None or key_ids is None else (query_ids, key_ids)


# Under zigzag a shard holds an early run and a late one, and so do its visitors. Keys of an earlier shard: both runs of
# queries see their early run, none sees the late one. Of a later shard: the late run of queries sees both. Either way
# two pairs of runs are wholly visible, and one of them is the late queries with the early keys. They are stacked along
# the batch, the pair that depends first, so that one call without a branch serves both.


def _query_runs(before: Array, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "twoB half *rest"]:
    early, late = jnp.split(x, 2, axis=1)
    return jnp.concatenate([jnp.where(before, early, late), late], axis=0)


def _key_runs(before: Array, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "twoB half *rest"]:
    early, late = jnp.split(x, 2, axis=1)
    return jnp.concatenate([jnp.where(before, early, late), early], axis=0)


def _only(where: Array, x: Array) -> Array:
    return jnp.where(where, x, 0)


def _halves(tree: Tree) -> tuple[Tree, Tree]:
    """The two pairs of runs, stacked along the batch."""
    halves = jax.tree.map(lambda x: jnp.split(x, 2, axis=0), tree)
    outer, inner = jax.tree.structure(tree), jax.tree.structure([0, 0])
    first, second = jax.tree.transpose(outer, inner, halves)
    return first, second
