"""grouped_matmul: rows sorted by group, each times the matrix of its group. Its interface: checks and dispatch only."""

from __future__ import annotations

import typing
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .arguments import check_grouped_arrays
from .dispatch import automatic, choose, target
from .grouped_dispatch import TABLE, GroupedProblem, Implementation

__all__ = ["Implementation", "grouped_matmul", "has_grouped_kernel"]


def grouped_matmul(
    x: Float[Array, "M I"],
    w: Float[Array, "E O I"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "M O"]:
    """`x[m] @ w[e].T` for every row m of group e, summed in float32.

    The first `group_sizes[0]` rows are of group 0, those behind them of group 1, and so on. Rows past the last group
    give zeros and may hold anything, NaN included. Differentiable in x and w; the gradient of a matrix that no row
    meets is zero. The kernels compute the gradient by w only where it is asked for.

    Args:
      x: rows, sorted by group.
      w: one matrix per group, [out, in] as checkpoints hold them.
      group_sizes: how many rows each group has; they sum up to M at most.
      implementation: "auto" picks by device, dtype and widths (the table in grouped_dispatch.py) and logs once what it
        passed over; "reference" (dense), "xla" (ragged_dot), "pallas_tpu", "pallas_gpu" by name.
      interpret: True, or the parameters of the platform's own interpreter, runs a Pallas kernel step by step on CPU.

    Returns the products in the dtype of x. Raises ValueError for arguments that do not fit together.
    """
    check_grouped_arrays(x, w, group_sizes)
    names = typing.get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(names)}")
    run = choose("grouped_matmul", TABLE, implementation, _problem(x, w, bool(interpret)))
    if not len(x):
        return jnp.zeros((0, w.shape[1]), x.dtype)
    settings = {"interpret": interpret} if interpret else {}
    return run(*map(jnp.asarray, (x, w)), jnp.asarray(group_sizes, jnp.int32), **settings)


def has_grouped_kernel(x: Float[Array, "M _"], w: Float[Array, "E O I"]) -> bool:
    """Whether a kernel serves rows of the dtype of x times these matrices, on the device compiled for.

    Where none does, ragged_dot is left, which multiplies every row by every matrix on CPU and GPU. Says once why a
    kernel for the device was passed over.
    """
    name = automatic("grouped_matmul", TABLE, _problem(x, w, interpret=False))
    return x.dtype == w.dtype and name is not None and TABLE[name].interpretable


def _problem(x: Array, w: Array, interpret: bool) -> GroupedProblem:
    return GroupedProblem(target(), x.dtype.name, (w.shape[2], w.shape[1]), interpret)
