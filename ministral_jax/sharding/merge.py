"""How attention over parts of the keys becomes attention over all of them: by log-sum-exp, on one shard or across."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Partial(NamedTuple):
    """Attention over some of the keys, and the log-sum-exp of their scores: -inf where none was seen."""

    out: Float[Array, "*T N Hv"]
    lse: Float[Array, "*T N"]


def _share(lse: Float[Array, "*T N"], of: Float[Array, "*T N"]) -> Float[Array, "*T N"]:
    """`exp(lse - of)`, 0 where nothing was seen."""
    return jnp.exp(lse - jnp.where(jnp.isfinite(of), of, 0.0))


def combined(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both, in float32."""
    lse = jnp.logaddexp(a.lse, b.lse)
    left, right = (part.out.astype(jnp.float32) * _share(part.lse, lse)[..., None] for part in (a, b))
    return Partial(left + right, lse)


def merge_partial(
    out: Float[Array, "*T N Hv"], lse: Float[Array, "*T N"], axis_name: str
) -> tuple[Float[Array, "*T N Hv"], Float[Array, "*T N"]]:
    """Attention over the keys of all shards of `axis_name`, from each shard's own; inside shard_map.

    Rows that see nothing on any shard give zeros and -inf. Two all-reduces: of the largest log-sum-exp, then of outputs
    and weights, in float32. Every shard gets the result, in the dtype of `out`.
    """
    top = lax.pmax(lse, axis_name)  # [*T, N]
    weight = _share(lse, top)
    total, mixed = lax.psum((weight, out.astype(jnp.float32) * weight[..., None]), axis_name)
    seen = total > 0
    merged = mixed / jnp.where(seen, total, 1.0)[..., None]
    return merged.astype(out.dtype), jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
