"""grouped_matmul on Hopper GPUs: what is refused, the plans, and the gradient. Imports no kernel itself.

The kernels need jax 0.11 (Mosaic GPU with warpgroup semantics). This module imports under any jax, and says so when
asked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..reference import FP8_BLOCK, in_a_group
from .flash import DTYPES, OLDEST_JAX, interpreter
from .grouped_plan import n_programs, plan_gradient, plan_product, visits

FP8 = "float8_e4m3fn"
WIDTH = 64  # inputs and outputs come in multiples of it: a swizzled row, and the narrowest tile
INTERPRETED_PROGRAMS = 2


def unsupported(dtype: str, widths: tuple[int, int], dtypes: tuple[str, ...] = DTYPES) -> str | None:
    """Why the kernel for `dtypes` cannot take x and w of this dtype and these widths (I, O), in one line; else None."""
    if jax.__version_info__[:2] < OLDEST_JAX:
        return f"the Hopper kernels need jax >= 0.11, found {jax.__version__}"
    if dtype not in dtypes:
        return f"x is {dtype}: this Hopper kernel takes {' or '.join(dtypes)}"
    multiple = FP8_BLOCK if dtype == FP8 else WIDTH
    if any(width % multiple for width in widths):
        return f"widths (in, out) are {widths}: the Hopper kernels take multiples of {multiple}"
    return None


def grouped_matmul_gpu(
    x: Float[Array, "M I"], w: Float[Array, "E O I"], group_sizes: Int[Array, "E"], *, interpret: Any = False
) -> Float[Array, "M O"]:
    """As `grouped_matmul_reference`, on Hopper. M is at least 1. Differentiable in x and w.

    Args:
      interpret: True runs the kernels on the CPU, in Mosaic GPU's interpreter with its race detector on; or the
        interpreter's parameters.

    Raises ValueError for what `unsupported` names.
    """
    reason = unsupported(x.dtype.name, (w.shape[2], w.shape[1]))
    if reason is not None:
        raise ValueError(f"implementation='pallas_gpu': {reason}")
    product: Array = _grouped(interpreter(interpret), x, w, group_sizes.astype(jnp.int32))
    return product


def grouped_matmul_fp8_gpu(
    x: Float[Array, "M I"],
    x_scale: Float[Array, "M blocks"],
    w: Float[Array, "E O I"],
    w_scale: Float[Array, "E row_blocks blocks"],
    group_sizes: Int[Array, "E"],
    *,
    interpret: Any = False,
) -> Float[Array, "M O"]:
    """As `grouped_matmul_fp8_reference`, on Hopper. M is at least 1. Not differentiable."""
    from .grouped_forward import Operands, Scales, grouped_forward

    plan = plan_product(len(x), len(w), w.shape[1], _programs(interpret), widest=FP8_BLOCK)
    scales = Scales(jnp.pad(x_scale.T, ((0, 0), (0, plan.rows))), w_scale)  # tiles end up to so many rows behind
    operands = Operands(x, w, visits(group_sizes, len(x), plan.rows), scales)
    out = grouped_forward(operands, plan=plan, turned=False, interpret=interpreter(interpret))
    return jnp.where(in_a_group(len(x), group_sizes)[:, None], out, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret: Any, x: Array, w: Array, group_sizes: Array) -> Array:
    return _product(interpret, x, w, group_sizes, turned=False)


def _forward(interpret: Any, x: Any, w: Any, group_sizes: Any) -> tuple[Array, Any]:
    """Keeps x only where the gradient by w is asked for, and w only where that by x is: frozen ones cost nothing."""
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None, group_sizes.value)
    return _grouped(interpret, x.value, w.value, group_sizes.value), kept


def _backward(interpret: Any, kept: Any, d_out: Any) -> tuple[Array | None, Array | None, None]:
    x, w, group_sizes = kept
    d_x = None if w is None else _product(interpret, d_out, w, group_sizes, turned=True)
    d_w = None if x is None else _weights(interpret, d_out, x, group_sizes)
    return d_x, d_w, None


_grouped.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(interpret: Any, x: Array, w: Array, group_sizes: Array, *, turned: bool) -> Array:
    """Rows times the matrices of their groups: those of w as they lie where `turned`, else transposed."""
    from .grouped_forward import Operands, grouped_forward

    plan = plan_product(len(x), len(w), w.shape[2 if turned else 1], _programs(interpret))
    operands = Operands(x, w, visits(group_sizes, len(x), plan.rows))
    out = grouped_forward(operands, plan=plan, turned=turned, interpret=interpret)
    return jnp.where(in_a_group(len(x), group_sizes)[:, None], out, 0)


def _weights(interpret: Any, d_out: Array, x: Array, group_sizes: Array) -> Array:
    """Of every matrix, the sum over the rows of its group of `d_out[m] x[m]^T`."""
    from .grouped_weights import ALIGNED, Operands, grouped_weights

    stops = jnp.cumsum(group_sizes)
    d_out, x = (jnp.pad(rows, ((0, -len(rows) % ALIGNED), (0, 0))) for rows in (d_out, x))
    plan = plan_gradient(d_out.shape[1], x.shape[1], _programs(interpret))
    return grouped_weights(Operands(d_out, x, stops - group_sizes, stops), plan=plan, interpret=interpret)


def _programs(interpret: Any) -> int:
    return INTERPRETED_PROGRAMS if interpret else n_programs()
