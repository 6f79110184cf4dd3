"""grouped_matmul_fp8: products by group of e4m3 numbers with a scale for each block of 128. Its interface."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .arguments import check_block_scales, check_grouped_arrays
from .dispatch import automatic, choose, target
from .grouped_dispatch import FP8_TABLE, GroupedProblem

__all__ = ["grouped_matmul_fp8", "has_grouped_fp8_kernel"]


def grouped_matmul_fp8(
    x: Float[Array, "M I"],
    x_scale: Float[Array, "M blocks"],
    w: Float[Array, "E O I"],
    w_scale: Float[Array, "E row_blocks blocks"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: Literal["pallas_gpu", "reference"] = "pallas_gpu",
    interpret: Any = False,
) -> Float[Array, "M O"]:
    """`grouped_matmul` of e4m3 numbers: the sum over blocks g of `x_scale[m, g] * w_scale[e, o // 128, g] * x_g . w_g`.

    Products of 128 inputs are summed on the tensor cores, blocks in float32; the result is bfloat16. Both widths are
    multiples of 128. Rows past the last group give zeros. Not differentiable.

    Args:
      x_scale: of each row and 128 of its columns, float32.
      w_scale: of each 128 x 128 block of the matrices, float32.
      group_sizes, interpret: as for `grouped_matmul`.

    Raises ValueError for arguments that do not fit together, or that the implementation cannot serve, with the reason.
    """
    check_grouped_arrays(x, w, group_sizes)
    check_block_scales(x_scale, w_scale, x, w)
    if implementation not in FP8_TABLE:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(FP8_TABLE)}")
    run = choose("grouped_matmul_fp8", FP8_TABLE, implementation, _problem(w, bool(interpret)))
    if not len(x):
        return jnp.zeros((0, w.shape[1]), jnp.bfloat16)
    return run(x, x_scale, w, w_scale, group_sizes, **({"interpret": interpret} if interpret else {}))


def has_grouped_fp8_kernel(w: Float[Array, "E O I"]) -> bool:
    """Whether a kernel serves such matrices on the device compiled for. Says once why one was passed over."""
    return automatic("grouped_matmul_fp8", FP8_TABLE, _problem(w, interpret=False)) is not None


def _problem(w: Array, interpret: bool) -> GroupedProblem:
    return GroupedProblem(target(), w.dtype.name, (w.shape[2], w.shape[1]), interpret)
