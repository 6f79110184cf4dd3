"""Full causal attention of split sequences: keys and values go round the ring, queries stay. Forward and backward.

Ring attention (Liu et al. 2023, arXiv 2310.01889), one kernel call per visiting block. Every transfer is issued before
the attention that it can hide behind. What lies in the future of all queries of a shard is not computed: it is skipped
under a contiguous split, and never arises under zigzag, where each visit is half visible on every shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention, flash_attention_gradients
from pallas_kernels.flash_attention import Implementation

from .chunks import Chunks
from .merge import Partial, combined

Tree = TypeVar("Tree")
Results = TypeVar("Results")
Run = Array | int  # which of a shard's runs of tokens


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
    """Of queries, keys and values: sums in float32, terms as the kernels give them."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K Hv"]


class Pairs(NamedTuple):
    """What is done with a run of queries and a run of keys: `add(carry, *runs, compute(*runs))`."""

    compute: Callable[[Run, Run], Any]
    nothing: Any  # numbers that stand for what `compute` gives where no query sees a key
    add: Callable[[Any, Run, Run, Any], Any]


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
    out, lse = flash_attention(q, k, v, segment_ids=ids, return_lse=True, **settings.options)

    def visit(step: Array | int, visiting: Keys, seen: Partial, transfers: Tree) -> tuple[Partial, Tree]:
        def attend(query_run: Run, key_run: Run) -> Partial:
            (queries, query_ids), keys = _run(chunks, (q, ids), query_run), _run(chunks, visiting, key_run)
            options = {"segment_ids": _pair(query_ids, keys.ids), "query_offset": chunks.length, **settings.options}
            return Partial(*flash_attention(queries, keys.k, keys.v, return_lse=True, **options))

        def merge(seen: Partial, query_run: Run, key_run: Run, part: Partial) -> Partial:
            del key_run
            return _with_run(chunks, seen, query_run, combined(_run(chunks, seen, query_run), part))

        pairs = Pairs(attend, Partial(jnp.zeros(()), jnp.full((), -jnp.inf)), merge)
        return _over_visible(chunks, step, pairs, seen, transfers)

    def turn(step: Array, carry: tuple[Partial, Keys]) -> tuple[Partial, Keys]:
        seen, visiting = carry
        return visit(step, visiting, seen, _passed_on(chunks, visiting))

    seen = Partial(out.astype(jnp.float32), lse)
    seen, visiting = lax.fori_loop(1, last, turn, (seen, visiting)) if last > 1 else (seen, visiting)
    seen, _ = visit(last, visiting, seen, None)
    return seen._replace(out=seen.out.astype(q.dtype))


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
    total = _wide(_local_gradients(settings, rows, own, offset=0))

    def visit(step: Array | int, visiting: Keys, total: Gradients, transfers: Tree) -> tuple[Gradients, Tree]:
        def differentiate(query_run: Run, key_run: Run) -> Gradients:
            pair = _run(chunks, rows, query_run), _run(chunks, visiting, key_run)
            return _local_gradients(settings, *pair, offset=chunks.length)

        def add(terms: Gradients, query_run: Run, key_run: Run, new: Gradients) -> Gradients:
            old = Gradients(_run(chunks, terms.q, query_run), *_run(chunks, terms[1:], key_run))
            new = jax.tree.map(jnp.add, old, _wide(new))
            return Gradients(
                _with_run(chunks, terms.q, query_run, new.q), *_with_run(chunks, terms[1:], key_run, new[1:])
            )

        # The sums of the keys that visit come from the shard before, while this one computes its own terms.
        sums = _passed_on(chunks, (total.k, total.v), closed=True)
        nothing = (jnp.zeros(x.shape, jnp.float32) for x in (visiting.k, visiting.v))
        pairs = Pairs(differentiate, Gradients(*[jnp.zeros(())] * 3), add)
        terms, ((dk, dv), transfers) = _over_visible(
            chunks, step, pairs, Gradients(total.q, *nothing), (sums, transfers)
        )
        return Gradients(terms.q, dk + terms.k, dv + terms.v), transfers

    def turn(step: Array, carry: tuple[Gradients, Keys]) -> tuple[Gradients, Keys]:
        total, visiting = carry
        return visit(step, visiting, total, _passed_on(chunks, visiting))

    total, visiting = lax.fori_loop(1, last, turn, (total, visiting)) if last > 1 else (total, visiting)
    total, _ = visit(last, visiting, total, None)
    dk, dv = _passed_on(chunks, (total.k, total.v), closed=True)  # home
    no_gradient = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), ids)
    return total.q.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), no_gradient


_ring.defvjp(_forward_with_residuals, _backward)


def _passed_on(chunks: Chunks, tree: Tree, closed: bool = False) -> Tree:
    """Each shard's arrays, given to the next; from the last to the first only where the ring is closed.

    Under a contiguous split no shard looks at keys of later ones, so that their ring is open.
    """
    closed = closed or chunks.per_shard > 1
    pairs = [(shard, (shard + 1) % chunks.shards) for shard in range(chunks.shards if closed else chunks.shards - 1)]
    return jax.tree.map(lambda x: lax.ppermute(x, chunks.axis_name, pairs), tree)


def _meanwhile(results: Results, transfers: Tree) -> tuple[Results, Tree]:
    """Both, neither used before all is there: so that transfers get the time of the kernels, the longest there is."""
    return lax.optimization_barrier((results, transfers))


def _over_visible(
    chunks: Chunks, step: Array | int, pairs: Pairs, carry: Results, transfers: Tree
) -> tuple[Results, Tree]:
    """`carry` after all runs that see each other: queries of this shard, and keys that visit at `step`, from that many
    shards back. Each sees the other's whole run, since neither is its own. `transfers` are under way meanwhile.

    Keys of an earlier shard: both runs of queries under zigzag see their early run, none sees the late one. Of a later
    shard: late queries see both. Either way the late queries see the early keys, and one other pair is visible.
    """
    before = lax.axis_index(chunks.axis_name) >= step
    if chunks.per_shard == 1:
        shapes = jax.eval_shape(pairs.compute, 0, 0)
        nothing = jax.tree.map(lambda x, value: jnp.full(x.shape, value, x.dtype), shapes, pairs.nothing)
        part, transfers = _meanwhile(lax.cond(before, lambda: pairs.compute(0, 0), lambda: nothing), transfers)
        return pairs.add(carry, 0, 0, part), transfers
    depends = jnp.where(before, 0, 1)

    def one(i: Array, carry: Results) -> Results:
        runs = jnp.where(i == 0, depends, 1), jnp.where(i == 0, depends, 0)
        return pairs.add(carry, *runs, pairs.compute(*runs))

    return _meanwhile(lax.fori_loop(0, 2, one, carry), transfers)


def _run(chunks: Chunks, tree: Tree, number: Run) -> Tree:
    """One run of every array [B, T, ...]."""
    if chunks.per_shard == 1:
        return tree
    start = number * chunks.length
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, chunks.length, axis=1), tree)


def _with_run(chunks: Chunks, tree: Tree, number: Run, new: Tree) -> Tree:
    """The arrays with one run replaced."""
    if chunks.per_shard == 1:
        return new
    start = number * chunks.length
    return jax.tree.map(lambda x, run: lax.dynamic_update_slice_in_dim(x, run, start, axis=1), tree, new)


def _local_gradients(settings: RingSettings, rows: Rows, keys: Keys, offset: int) -> Gradients:
    operands = rows.q, keys.k, keys.v, rows.d_out, rows.lse, rows.delta
    found = flash_attention_gradients(
        *operands, segment_ids=_pair(rows.ids, keys.ids), query_offset=offset, **settings.options
    )
    return Gradients(*found)


def _wide(gradients: Gradients) -> Gradients:
    return Gradients(*(x.astype(jnp.float32) for x in gradients))


def _pair(query_ids: Array | None, key_ids: Array | None) -> tuple[Array, Array] | None:
    return None if query_ids is None or key_ids is None else (query_ids, key_ids)
