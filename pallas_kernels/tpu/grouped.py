"""grouped_matmul on TPUs: jax's megablox kernel, which reads [out, in] matrices as they lie."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..reference import in_a_group

# Rows of a tile: at most enough for a matrix unit, at least a bfloat16 tile; and 2 MB of a matrix at a time.
MOST_ROWS, LEAST_ROWS, WIDEST_TILE = 128, 16, 1024


def grouped_matmul_tpu(
    x: Float[Array, "M I"], w: Float[Array, "E O I"], group_sizes: Int[Array, "E"], *, interpret: Any = False
) -> Float[Array, "M O"]:
    """As `grouped_matmul_reference`. Work follows the rows; matrices of groups without rows are not read.

    XLA's own lowering of ragged_dot has as many operations but copies all of w to [E, I, O] first.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    n_rows, (_, n_out, n_in) = len(x), w.shape
    rows = min(1 << max(n_rows - 1, LEAST_ROWS - 1).bit_length(), MOST_ROWS)
    inside = in_a_group(n_rows, group_sizes)[:, None]
    # The mask is for its gradient: megablox leaves that of rows past the last group as it found the memory.
    padded = jnp.pad(jnp.where(inside, x, 0), ((0, -n_rows % rows), (0, 0)))
    tiles = (rows, min(n_in, WIDEST_TILE), min(n_out, WIDEST_TILE))
    out = gmm(padded, w, group_sizes, x.dtype, tiles, transpose_rhs=True, interpret=interpret)[:n_rows]
    return jnp.where(inside, out, 0)
