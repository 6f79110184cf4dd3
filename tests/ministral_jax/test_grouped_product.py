"""Products by group: every row meets its own expert's matrix, and the matrices of experts without rows are not read."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ministral_jax import grouped_product as grouped_product_module
from ministral_jax.grouped_product import MAX_BRANCHES, by_blocks, fp8_product, grouped_product, rows_per_block
from ministral_jax.quantization import Fp8BlockWeight, frozen_product
from pallas_kernels import grouped_matmul_fp8

from .paged_runner import QUICK

ROWS, WIDTH, OUT = 40, 12, 20
FEW, MANY = 5, MAX_BRANCHES + 3  # experts with a branch for each, and more
CLOSE = 1e-5


def row_experts(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@functools.cache
def problem(n_experts: int, n_rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n_experts)
    shapes = ((n_rows, WIDTH), (n_experts, OUT, WIDTH))
    rows, weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return rows, weights


@functools.partial(jax.jit, compiler_options=QUICK)
def product(rows: Any, weights: Any, sizes: Any) -> Any:
    return grouped_product(rows, weights, sizes, implementation="blocks")


def one_by_one(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Row by row in float64; zeros past the last group."""
    out = np.zeros((len(rows), weights.shape[1]))
    for row, expert in enumerate(row_experts(sizes)):
        out[row] = weights[expert].astype(np.float64) @ rows[row].astype(np.float64)
    return out


def group_sizes(n_experts: int) -> st.SearchStrategy[list[int]]:
    """Any sizes that sum up to ROWS at most: many experts empty, one with everything, a remainder in no group."""
    cuts = st.lists(st.integers(0, ROWS), min_size=n_experts, max_size=n_experts)
    return cuts.map(lambda cuts: np.diff([0, *sorted(cuts)]).tolist())


@pytest.mark.parametrize("n_experts", [FEW, MANY])
@settings(max_examples=25)
@given(data=st.data())
def test_each_row_meets_the_matrix_of_its_expert_and_no_other_is_read(n_experts: int, data: st.DataObject) -> None:
    sizes = data.draw(group_sizes(n_experts))
    rows, weights = problem(n_experts)
    expected = one_by_one(rows, weights, sizes)
    poisoned = np.where((np.array(sizes) > 0)[:, None, None], weights, np.nan)
    found = np.asarray(product(rows, poisoned, np.array(sizes, np.int32)))
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected, axis=None) + 1e-12


@pytest.mark.parametrize("n_rows", [1, 2, 7, 600])
def test_any_number_of_rows_fits_into_blocks(n_rows: int) -> None:
    """One row alone, fewer rows than experts, and many whole blocks with remainders."""
    rows, weights = problem(FEW, n_rows)
    sizes = np.diff([0, *sorted(np.random.default_rng(n_rows).integers(0, n_rows + 1, FEW - 1)), n_rows]).tolist()
    expected = one_by_one(rows, weights, sizes)
    found = np.asarray(product(rows, weights, np.array(sizes, np.int32)))
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


@pytest.mark.parametrize("n_experts", [FEW, MANY])
def test_gradients_are_those_of_the_dense_formula(n_experts: int) -> None:
    """Of rows and of all matrices; rows past the last group and experts without rows get zeros."""
    rows, weights = problem(n_experts)
    sizes = [0] * n_experts
    sizes[0], sizes[2], sizes[4] = 11, 17, 3
    experts = row_experts(sizes)
    answer = np.random.default_rng(1).standard_normal((ROWS, OUT)).astype(np.float32)

    def dense(rows: Any, weights: Any) -> Any:
        return jnp.sum(jnp.einsum("mi,moi->mo", rows[: len(experts)], weights[experts]) * answer[: len(experts)])

    def grouped(rows: Any, weights: Any) -> Any:
        return jnp.sum(grouped_product(rows, weights, jnp.array(sizes, jnp.int32), implementation="blocks") * answer)

    compiled, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1)), compiler_options=QUICK)(rows, weights) for f in (grouped, dense)
    )
    for found, wanted in zip(compiled, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * float(np.ptp(wanted)))


def test_rows_of_no_expert_that_are_no_numbers_reach_no_gradient() -> None:
    rng, sizes = np.random.default_rng(0), jnp.asarray([20, 25], jnp.int32)
    x = jnp.asarray(rng.normal(size=(60, 8)), jnp.float32).at[50:].set(jnp.nan)
    w = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)

    def total(x: Any, w: Any) -> Any:
        return jnp.sum(grouped_product(x, w, sizes, implementation="blocks"))

    d_x, d_w = jax.jit(jax.grad(total, (0, 1)), compiler_options=QUICK)(x, w)
    assert np.isfinite(np.asarray(d_w)).all()
    assert not np.asarray(d_x)[45:].any()
    np.testing.assert_allclose(np.asarray(d_w)[0], np.tile(np.asarray(x)[:20].sum(axis=0), (4, 1)), rtol=1e-5)


@pytest.mark.parametrize(("rows", "experts"), [(1024, 8), (2048, 64), (10**6, 8)])
def test_blocks_fill_up_large_shares_by_half_at_most(rows: int, experts: int) -> None:
    share, block = rows // experts, rows_per_block(rows, experts, "cpu")
    assert math.ceil(share / block) * block <= 1.5 * share


@pytest.mark.parametrize(("rows", "experts"), [(8, 8), (32, 8), (64, 8), (256, 128)])
def test_an_expert_with_twice_its_share_of_few_rows_is_read_once(rows: int, experts: int) -> None:
    assert 2 * rows // experts <= rows_per_block(rows, experts, "tpu") <= 16


def test_a_single_token_meets_its_experts_in_blocks_of_one_row() -> None:
    assert rows_per_block(2, 8, "tpu") == rows_per_block(4, 128, "cpu") == 1


def test_fp8_blocks_by_the_kernel_are_the_product_of_one_expert_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit of bfloat16, with the definition in the kernel's place; and the gradient by rows is the same."""
    definition = functools.partial(grouped_matmul_fp8, implementation="reference")
    monkeypatch.setattr(grouped_product_module, "grouped_matmul_fp8", definition)
    rng, sizes = np.random.default_rng(0), jnp.asarray([7, 0, 20, 3], jnp.int32)
    x, d_out = (jnp.asarray(rng.normal(size=(ROWS, width)), jnp.bfloat16) for width in (256, 128))
    payload = jnp.asarray(rng.normal(size=(4, 128, 256)), jnp.float8_e4m3fn)
    scale = jnp.asarray(np.exp(rng.normal(size=(4, 1, 2))), jnp.float32)

    def one(_: Any, frozen: Any, rows: Any) -> Any:
        return frozen_product(Fp8BlockWeight(*frozen), rows, rounded=True)

    def both(product: Any, x: Any) -> Any:
        out, pull = jax.vjp(product, x)
        return out, pull(d_out)[0]

    found, expected = (
        jax.jit(functools.partial(both, product), compiler_options=QUICK)(x)
        for product in (
            lambda x: fp8_product(x, payload, scale, sizes),
            lambda x: by_blocks(one, None, (payload, scale), x, sizes),
        )
    )
    np.testing.assert_allclose(*(np.asarray(out[0], np.float32) for out in (found, expected)), rtol=2**-7, atol=1e-3)
    np.testing.assert_array_equal(*(np.asarray(out[1], np.float32) for out in (found, expected)))
    assert np.abs(np.asarray(found[1], np.float32)[:30]).max(axis=1).min() > 0
