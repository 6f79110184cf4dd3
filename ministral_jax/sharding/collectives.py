"""What a layer needs before it can compute on its shard: whole rows of its weights, and rows of a split vocabulary.

Both are written out, so that the collectives of a compiled program are those that were meant.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from ..parameters import ParameterSpec
from .layout import Layout, weight_axes

Module = TypeVar("Module", bound=nnx.Module)

# Split only to be kept: a layer gathers these before it runs, since activations carry the whole width.
STORED_APART = ("embed", "expert_embed")


def gathered(module: Module, layout: Layout | None) -> Module:
    """The module with each weight as it is used: whole along what `fsdp` and `context` keep apart; inside jit.

    In the backward pass a gradient goes straight to the shards that keep it, a reduce-scatter.
    """
    if layout is None or not any(layout.along(axis) for axis in STORED_APART):
        return module
    graph, state = nnx.split(module)
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        if isinstance(leaf, nnx.Variable) and "axes" in leaf.get_metadata():
            leaf = leaf.replace(_gathered_array(leaf, layout))
        flat.append((path, leaf))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _gathered_array(leaf: nnx.Variable, layout: Layout) -> Array:
    value = leaf.get_value()
    axes = leaf.get_metadata("axes")[-value.ndim :] if value.ndim else ()  # a scan has taken the layers' axis away
    stored = weight_axes(ParameterSpec(value.shape, axes, value.dtype, leaf.get_metadata("init")), layout)
    used = tuple(None if axis in STORED_APART else axis for axis in stored)
    if layout.spec(used) == layout.spec(stored):
        return value
    return _reshard(value, layout.sharding(stored), layout.sharding(used))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: Array, stored: NamedSharding, used: NamedSharding) -> Array:
    return lax.with_sharding_constraint(lax.with_sharding_constraint(x, stored), used)


def _reshard_forward(x: Array, stored: NamedSharding, used: NamedSharding) -> tuple[Array, None]:
    return _reshard(x, stored, used), None


def _reshard_backward(stored: NamedSharding, used: NamedSharding, _: None, gradient: Array) -> tuple[Array]:
    del used
    return (lax.with_sharding_constraint(gradient, stored),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "*T"], layout: Layout | None, axes: tuple[str | None, ...]
) -> Float[Array, "*T D"]:
    """`table[tokens]` where the vocabulary may be split: each device looks up the rows it has, and they are added.

    `axes` are the logical axes of `tokens`. One all-reduce of the result, exact: all but one term are zero.
    """
    if layout is None or layout.ways("vocab") == 1:
        return table[tokens]
    along = layout.along("vocab")

    def local(rows: Array, ids: Array) -> Array:
        first = lax.axis_index(along) * rows.shape[0]
        mine = (ids >= first) & (ids < first + rows.shape[0])
        found = jnp.where(mine[..., None], rows[jnp.where(mine, ids - first, 0)], 0)
        return lax.psum(found, along)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec(("vocab", None)), layout.spec(axes)),
        out_specs=layout.spec((*axes, "act_embed")),
        check_vma=False,
    )(table, tokens)
