"""Tokens to the devices that hold their experts and back: an all-to-all with exact counts. For use inside shard_map.

Nothing is dropped. Buffers have room for the worst case, all copies of all devices on one; what travels is what was
sent, by `jax.lax.ragged_all_to_all`, except on CPU, which has no such operation: there whole buffers travel.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import target

# Tokens are sent in as many rounds as it takes to keep the buffer of the worst case below this.
MAX_BUFFER_BYTES = 512 * 2**20


def exchange(
    rows: Float[Array, "M D"], counts: Int[Array, "source destination"], axis: str, room: int
) -> Float[Array, "R D"]:
    """The rows sent to this device, by source; `room` of them, zeros behind the last.

    `rows` are sorted by destination. `counts[s, d]` rows go from device s of the mesh axis `axis` to device d; every
    device has the whole table.
    """
    here = lax.axis_index(axis)
    sent, received = counts[here], counts[:, here]
    out = jnp.zeros((room, rows.shape[1]), rows.dtype)
    if target().platform == "cpu":
        return _padded_exchange(rows, out, sent, received, axis)
    places = (jnp.cumsum(counts, axis=0) - counts)[here]  # where this device's rows begin at each destination
    return lax.ragged_all_to_all(rows, out, _starts(sent), sent, places, received, axis_name=axis)


def _padded_exchange(rows: Array, out: Array, sent: Array, received: Array, axis: str) -> Float[Array, "R D"]:
    """The same by a buffer of M rows for every destination."""
    n_rows, n_devices = len(rows), len(sent)
    offsets = jnp.arange(n_rows)
    from_rows = jnp.where(offsets < sent[:, None], _starts(sent)[:, None] + offsets, n_rows)  # [X, M]
    buffers = rows.at[from_rows].get(mode="fill", fill_value=0)  # [X, M, D]
    arrived = lax.all_to_all(buffers, axis, 0, 0)
    to_rows = jnp.where(offsets < received[:, None], _starts(received)[:, None] + offsets, len(out))
    return out.at[to_rows.reshape(-1)].set(arrived.reshape(n_devices * n_rows, -1), mode="drop")


def _starts(sizes: Int[Array, "X"]) -> Int[Array, "X"]:
    return jnp.cumsum(sizes) - sizes


def at_their_experts(
    run: Callable[[Array, Array], Array],
    rows: Float[Array, "M D"],
    sizes: Int[Array, "E"],
    axis: str,
    room: int,
) -> Float[Array, "M D"]:
    """`run(rows, group_sizes)` of every row on the device of mesh axis `axis` that holds its expert.

    `rows` are sorted by expert, `sizes[e]` of them for expert e of all; each device of the axis holds an equal run of
    experts, and `run` gets rows sorted by expert, and how many each of its own has. No more than `room` arrive on any
    device.
    """
    n_devices, n_rows = lax.axis_size(axis), len(rows)
    table = lax.all_gather(sizes, axis).reshape(n_devices, n_devices, -1)  # [source, destination, experts of one]
    counts = jnp.sum(table, axis=-1)
    arrived = exchange(rows, counts, axis, room)  # [R, D], by source, then by expert
    mine = table[:, lax.axis_index(axis)]  # [source, experts of one]
    order, inverse = _sorted_by_expert(mine, room)
    answers = run(arrived[order], jnp.sum(mine, axis=0))[inverse]
    return exchange(answers, counts.T, axis, n_rows)


def _sorted_by_expert(mine: Int[Array, "source experts"], room: int) -> tuple[Int[Array, "R"], Int[Array, "R"]]:
    """The order that takes rows which lie by source, then expert, to expert alone, empty ones last; and its inverse."""
    n_sources, n_experts = mine.shape
    ends = jnp.cumsum(mine.reshape(-1))
    run_of_row = jnp.searchsorted(ends, jnp.arange(room), side="right")  # source * experts + expert
    expert = jnp.where(run_of_row < n_sources * n_experts, run_of_row % n_experts, n_experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(room, dtype=jnp.int32))
