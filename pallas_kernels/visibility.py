"""Which keys a query sees: the one definition of causality, window and segments that every implementation follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def visible(query: Array, key: Array, window: int | None) -> Array:
    """True where the key at position `key` is seen from position `query`: `0 <= query - key < window`.

    Positions are int32 and broadcast against each other. `window=None` leaves causality alone.
    """
    distance = query - key
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def key_block_bounds(
    first_query: Array | int, last_query: Array | int, n_keys: Array | int, block: int, window: int | None
) -> tuple[Array, Array]:
    """Half-open range of key blocks that hold any key visible from positions `first_query .. last_query`.

    Key positions run from 0 to `n_keys - 1` in blocks of `block`. The range is empty (`stop <= start`) when nothing is
    seen.
    """
    first_query, last_query = jnp.asarray(first_query, jnp.int32), jnp.asarray(last_query, jnp.int32)
    oldest = jnp.zeros_like(first_query) if window is None else jnp.maximum(first_query - (window - 1), 0)
    stop = jnp.minimum(last_query + 1, n_keys)
    stop = jnp.where(oldest < stop, stop, 0)
    # Neither is negative, so truncating division will do; flooring division costs a kernel several scalar operations.
    return jax.lax.div(oldest, jnp.int32(block)), jax.lax.div(stop + (block - 1), jnp.int32(block))
