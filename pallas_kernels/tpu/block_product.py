"""Rows times a matrix in e4m3 with a float32 scale for each 128 x 128 block, on a TPU: the matrix is read once.

XLA's own products of such blocks want the columns apart from each other, and copy the matrix in that order first.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

BLOCK = 128
# Of one grid step: bytes of the matrix and of activations, of both of which two parts are in flight, and their rows.
MATRIX_BYTES, MOST_OUT = 4 * 2**20, 512
ROW_BYTES, MOST_ROWS = 2 * 2**20, 128
LEAST_ROWS = 16  # a tile of bfloat16


def block_product(
    x: Float[Array, "T I"],
    x_scale: Float[Array, "T G"] | None,
    payload: Float[Array, "O I"],
    scale: Float[Array, "row_blocks G"],
    *,
    interpret: Any = False,
) -> Float[Array, "T O"]:
    """Sums over G groups of 128 columns of `x @ payload.T`, each times `scale` and `x_scale`, in float32.

    O and I are multiples of 128. Not differentiable.
    """
    (n_rows, n_in), n_out = x.shape, len(payload)
    if not n_rows:
        return jnp.zeros((0, n_out), jnp.float32)
    most = min(MOST_ROWS, ROW_BYTES // (n_in * x.dtype.itemsize) // LEAST_ROWS * LEAST_ROWS)
    rows = max(LEAST_ROWS, min(-(-n_rows // LEAST_ROWS) * LEAST_ROWS, most))
    filling = ((0, -n_rows % rows), (0, 0))
    x_scale = jnp.ones((n_rows, n_in // BLOCK), jnp.float32) if x_scale is None else x_scale
    x, x_scale = jnp.pad(x, filling), jnp.pad(x_scale, filling)
    out = next(o for o in (MOST_OUT, 256, BLOCK) if o == BLOCK or (o * n_in <= MATRIX_BYTES and n_out % o == 0))
    of_rows = lambda o, t: (t, 0)  # noqa: E731
    return pl.pallas_call(
        functools.partial(_kernel, blocks=out // BLOCK),
        grid=(n_out // out, len(x) // rows),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, n_in), of_rows),
            pl.BlockSpec((rows, n_in // BLOCK), of_rows),
            pl.BlockSpec((out, n_in), lambda o, t: (o, 0)),
        ],
        out_specs=pl.BlockSpec((rows, out), lambda o, t: (t, o)),
        out_shape=jax.ShapeDtypeStruct((len(x), n_out), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * n_rows * n_in * n_out,
            transcendentals=0,
            bytes_accessed=n_in * n_out + n_rows * (n_in * x.dtype.itemsize + 4 * n_out),
        ),
        interpret=interpret,
    )(scale, x, x_scale, payload)[:n_rows]


def _kernel(scale: Any, x: Any, x_scale: Any, payload: Any, out: Any, *, blocks: int) -> None:
    """`blocks` blocks of rows of the matrix, one group of columns after the other."""
    first = pl.program_id(0) * blocks
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    sums = jnp.zeros(out.shape, jnp.float32)
    for g in range(x_scale.shape[1]):
        columns = slice(g * BLOCK, (g + 1) * BLOCK)
        of_blocks = [jnp.full((1, BLOCK), scale[first + j, g], jnp.float32) for j in range(blocks)]
        weights = payload[:, columns].astype(x.dtype)
        part = lax.dot_general(
            x[:, columns], weights, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32
        )
        sums += part * (x_scale[:, g : g + 1] * jnp.concatenate(of_blocks, axis=1))
    out[...] = sums
