"""Products of rows with the matrix of the expert that each row goes to. Knows arrays; routing is moe.py's.

Rows are sorted by expert; `group_sizes[e]` of them go to expert e, and the work follows that number, not the number of
experts. On TPUs and Hopper GPUs that is a kernel, `grouped_matmul`; on Hopper FP8 blocks have one too. Elsewhere XLA
would expand its ragged_dot to every row times every expert, so there a loop takes a block of rows of one expert at a
time. The same loop serves other quantised weights on every platform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import grouped_matmul, grouped_matmul_fp8, has_grouped_kernel
from pallas_kernels.dispatch import target
from pallas_kernels.reference import in_a_group

from .quantization import Fp8BlockWeight, frozen_product
from .quantization.fp8 import BLOCK
from .quantization.rounding import FP8_MAX, dynamic_scale, to_fp8

Implementation = Literal["auto", "blocks"]
# What one expert does with rows: (its trained weights, its frozen weights, rows [R, I]) -> rows [R, O].
Apply = Callable[[Any, Any, Array], Array]

# A block is at most this many rows: enough for a matrix unit, few beside what a group is filled up to.
MAX_ROWS = 128
# Up to so many rows, a product costs reading its matrix: a tile of a TPU.
READ_ONCE_ROWS = 16
# Up to so many rows of an expert, one at a time are faster on a CPU than a block: 0.32 ms each, a block of 2 takes 1.6.
CPU_SINGLE_ROWS = 5
# On a CPU the loop has a branch for each of up to this many experts, in which XLA reads that expert's matrices where
# they lie; more branches compile too long, and a slice at a computed index is copied first (3 times the time of one
# token). On a TPU XLA reads such a slice where it lies, and 16 branches did not compile in nine minutes.
MAX_BRANCHES = 16


def grouped_product(
    x: Float[Array, "M I"],
    weights: Float[Array, "E O I"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "M O"]:
    """Row m times the transposed matrix of the expert whose group it is in; zeros for rows past the last group.

    "auto" is a kernel where the device has one for these arrays, and "blocks" elsewhere. Raises ValueError for another
    implementation.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(get_args(Implementation))}")
    if implementation == "auto" and has_grouped_kernel(x, weights):
        return grouped_matmul(x, weights, group_sizes)
    return by_blocks(_matrix_product, weights, None, x, group_sizes)


@jax.custom_vjp
def fp8_product(
    x: Float[Array, "M I"],
    payload: Float[Array, "E O I"],
    scale: Float[Array, "E row_blocks column_blocks"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "M O"]:
    """`frozen_product` of all experts by a kernel, of bfloat16 rows that are rounded. Its gradient is by_blocks's."""
    columns = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    x_scale = dynamic_scale(columns, FP8_MAX)  # [M, blocks, 1]
    rows = to_fp8(columns, x_scale).reshape(x.shape)
    return grouped_matmul_fp8(rows, x_scale[..., 0], payload, scale, group_sizes)


def _fp8_forward(x: Array, payload: Array, scale: Array, group_sizes: Array) -> tuple[Array, Any]:
    return fp8_product(x, payload, scale, group_sizes), (x, payload, scale, group_sizes)


def _fp8_backward(kept: Any, d_out: Array) -> tuple[Array, None, None, None]:
    x, payload, scale, group_sizes = kept

    def of_one(_: Any, frozen: Any, rows: Array) -> Array:
        return frozen_product(Fp8BlockWeight(*frozen), rows, rounded=True)

    pull = jax.vjp(lambda x: by_blocks(of_one, None, (payload, scale), x, group_sizes), x)[1]
    return pull(d_out)[0], None, None, None


fp8_product.defvjp(_fp8_forward, _fp8_backward)


def rows_per_block(n_rows: int, n_experts: int, platform: str) -> int:
    """Rows that the loop takes at a time: a power of two.

    Few rows cost what it takes to read a matrix, so where an expert's share is small a block is twice that, and most
    experts are read once; but on a CPU blocks are single rows, whose products alone XLA computes where a matrix lies.
    Where the share is large, half of it: groups are filled up to whole blocks, by half a block in the mean.
    """
    share = max(n_rows // n_experts, 1)
    if platform == "cpu" and share <= CPU_SINGLE_ROWS:
        return 1
    once = 1 if n_rows < n_experts else min(2 * share, READ_ONCE_ROWS)
    return min(1 << (max(once, share // 2).bit_length() - 1), MAX_ROWS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_blocks(
    apply: Apply, trained: Any, frozen: Any, x: Float[Array, "M I"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M O"]:
    """`apply(trained of e, frozen of e, rows of e)` for every expert with rows; zeros for rows past the last group.

    Each leaf of `trained` and `frozen` has experts as its first axis, and is never read for an expert without rows.
    Differentiable in `x` and `trained`.
    """
    blocks = _Blocks.of(x, group_sizes)
    weights, padded = (trained, frozen), blocks.padded(x)  # [M + R, I]
    one = jax.eval_shape(functools.partial(_branch, apply), weights, blocks.n_blocks, blocks.slice(padded, 0))

    def body(i: Array, out: Array) -> Array:
        expert, start, _ = blocks.place(i)
        mixed = _branch(apply, weights, expert, blocks.slice(padded, start))  # [R, O]
        # Rows beyond the group are garbage until the groups they belong to, which come later, overwrite them.
        return lax.dynamic_update_slice_in_dim(out, mixed, start, 0)

    out = lax.fori_loop(0, blocks.n_blocks, body, jnp.zeros((len(padded), *one.shape[1:]), one.dtype))[: len(x)]
    return jnp.where(in_a_group(len(x), group_sizes)[:, None], out, 0)


def _forward(apply: Apply, trained: Any, frozen: Any, x: Array, group_sizes: Array) -> tuple[Array, Any]:
    return by_blocks(apply, trained, frozen, x, group_sizes), (trained, frozen, x, group_sizes)


def _backward(apply: Apply, kept: Any, d_out: Array) -> tuple[Any, None, Array, None]:
    """Block by block again: what `apply` gives back for its rows, and for one expert's weights, which are summed."""
    trained, frozen, x, group_sizes = kept
    blocks = _Blocks.of(x, group_sizes)
    padded, d_padded = blocks.padded(x), blocks.padded(d_out)

    def pull(trained: Any, frozen: Any, rows: Array, d_rows: Array) -> tuple[Any, Array]:
        return jax.vjp(lambda trained, rows: apply(trained, frozen, rows), trained, rows)[1](d_rows)

    def body(i: Array, sums: tuple[Any, Array]) -> tuple[Any, Array]:
        d_trained, d_x = sums
        expert, start, inside = blocks.place(i)
        # Rows of others are zeros on both sides: what is not finite there would reach the sums as 0 times itself.
        rows, d_rows = (jnp.where(inside[:, None], blocks.slice(array, start), 0) for array in (padded, d_padded))
        d_one, d_block = _branch(pull, (trained, frozen), expert, rows, d_rows)
        d_trained = jax.tree.map(lambda total, part: total.at[expert].add(part), d_trained, d_one)
        return d_trained, lax.dynamic_update_slice_in_dim(d_x, d_block, start, 0)

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    d_trained, d_x = lax.fori_loop(0, blocks.n_blocks, body, (zeros, jnp.zeros_like(padded)))
    d_trained = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), d_trained, trained)
    return d_trained, None, jnp.where(in_a_group(len(x), group_sizes)[:, None], d_x[: len(x)], 0), None


by_blocks.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """Sorted rows in blocks of at most `rows` of one expert."""

    rows: int
    group_sizes: Int[Array, "E"]
    last_block: Int[Array, "E"]

    @staticmethod
    def of(x: Array, group_sizes: Array) -> _Blocks:
        rows = rows_per_block(len(x), len(group_sizes), target().platform)
        return _Blocks(rows, group_sizes, jnp.cumsum(-(-group_sizes // rows)))

    @property
    def n_blocks(self) -> Int[Array, ""]:
        return self.last_block[-1]

    def padded(self, x: Float[Array, "M I"]) -> Float[Array, "M_plus_R I"]:
        """Rows with a block of zeros behind them, so that no block ends past the end."""
        return jnp.pad(x, ((0, self.rows), (0, 0)))

    def slice(self, padded: Float[Array, "M_plus_R I"], start: Int[Array, ""] | int) -> Float[Array, "R I"]:
        return lax.dynamic_slice_in_dim(padded, start, self.rows)

    def place(self, i: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""], Bool[Array, "R"]]:
        """Expert and first row of block i, and which of its rows belong to the expert."""
        expert = jnp.searchsorted(self.last_block, i, side="right").astype(jnp.int32)
        end = jnp.cumsum(self.group_sizes)[expert]
        size = self.group_sizes[expert]
        within = i - (self.last_block[expert] + -size // self.rows)
        start = (end - size + within * self.rows).astype(jnp.int32)
        return expert, start, start + jnp.arange(self.rows) < end


def _branch(function: Callable[..., Any], weights: Any, expert: Int[Array, ""], *operands: Array) -> Any:
    """`function(*weights of the expert, *operands)`."""
    n_experts = len(jax.tree.leaves(weights)[0])
    if n_experts > MAX_BRANCHES or target().platform == "tpu":
        return function(*_expert(weights, expert), *operands)
    branches = [functools.partial(lambda e, *rest: function(*_expert(weights, e), *rest), e) for e in range(n_experts)]
    return lax.switch(expert, branches, *operands)


def _expert(weights: Any, expert: Int[Array, ""] | int) -> Any:
    if isinstance(expert, int):
        return jax.tree.map(lambda leaf: leaf[expert], weights)
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weights)


def _matrix_product(weight: Float[Array, "O I"], _: None, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
    return x @ weight.T  # of one row, XLA's CPU backend fuses this with the slice; it copies for an einsum
