"""Products by group: the definition against float64, the other implementations against it, and which one is chosen."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, grouped_matmul, grouped_matmul_fp8, has_grouped_fp8_kernel, has_grouped_kernel
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_dispatch import TABLE, GroupedProblem

ROWS, WIDTH, OUT, GROUPS = 40, 12, 20, 5
CLOSE = 1e-5
CPU, TPU, H200, A100 = (
    Target("cpu", "cpu"),
    Target("tpu", "TPU v6 lite"),
    Target("gpu", "NVIDIA H200"),
    Target("gpu", "NVIDIA A100-SXM4-80GB"),
)
# The tests' hook checks shapes before the function is entered; users run without it.
unchecked: Any = getattr(grouped_matmul, "__wrapped__", grouped_matmul)
choose = functools.partial(dispatch.choose, "grouped_matmul", TABLE)


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, WIDTH), (GROUPS, OUT, WIDTH)))
    return rows, weights


def one_by_one(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Row by row in float64; zeros past the last group."""
    out = np.zeros((len(rows), weights.shape[1]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = weights[group].astype(np.float64) @ rows[row].astype(np.float64)
    return out


def group_sizes() -> st.SearchStrategy[list[int]]:
    """Any sizes that sum up to ROWS at most: empty groups, one with everything, a remainder in no group."""
    cuts = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS)
    return cuts.map(lambda cuts: np.diff([0, *sorted(cuts)]).tolist())


@functools.partial(jax.jit, static_argnames="implementation")
def product(rows: Any, weights: Any, sizes: Any, implementation: Any) -> Any:
    return grouped_matmul(rows, weights, sizes, implementation=implementation, interpret=implementation == "pallas_tpu")


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@settings(max_examples=10)
@given(sizes=group_sizes())
def test_each_row_meets_the_matrix_of_its_group(implementation: str, sizes: list[int]) -> None:
    """Rows past the last group are NaN, and so are the matrices of empty groups where a kernel must not read them."""
    rows, weights = problem()
    rows = np.where(np.arange(ROWS)[:, None] < sum(sizes), rows, np.nan)
    if implementation == "pallas_tpu":
        weights = np.where((np.array(sizes) > 0)[:, None, None], weights, np.nan)
    expected = one_by_one(rows, weights, sizes)
    found = np.asarray(product(rows, weights, np.array(sizes, np.int32), implementation))
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected, axis=None) + 1e-12


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_gradients_are_those_of_the_dense_formula(implementation: Any) -> None:
    """Of rows and of all matrices; rows past the last group, which are NaN, and empty groups get zeros."""
    rows, weights = problem()
    sizes = [11, 0, 17, 0, 3]
    groups = np.repeat(np.arange(GROUPS), sizes)
    answer = np.random.default_rng(1).standard_normal((ROWS, OUT)).astype(np.float32)
    d_rows, d_weights = np.zeros(rows.shape), np.zeros(weights.shape)
    for row, group in enumerate(groups):
        d_rows[row] = answer[row].astype(np.float64) @ weights[group].astype(np.float64)
        d_weights[group] += np.outer(answer[row].astype(np.float64), rows[row].astype(np.float64))
    poisoned = np.where(np.arange(ROWS)[:, None] < sum(sizes), rows, np.nan)

    def loss(rows: Any, weights: Any) -> Any:
        return jnp.sum(product(rows, weights, jnp.array(sizes), implementation) * answer)

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(poisoned, weights)
    for got, want in zip(found, (d_rows, d_weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * float(np.ptp(want)))


def test_eight_bits_mean_their_numbers_times_the_scales_of_their_blocks() -> None:
    """And where there is no kernel, the layer of experts has something better than the definition."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float8_e4m3fn) for shape in ((3, 256), (2, 128, 256)))
    x_scale, w_scale = (rng.random(shape).astype(np.float32) for shape in ((3, 2), (2, 1, 2)))
    sizes = jnp.asarray([2, 0], jnp.int32)
    operands = (x, jnp.asarray(x_scale), w, jnp.asarray(w_scale), sizes)
    found = grouped_matmul_fp8(*operands, implementation="reference")
    wide = np.asarray(x, np.float64).reshape(3, 2, 128) * x_scale[..., None]
    matrix = np.asarray(w[0], np.float64).reshape(128, 2, 128) * w_scale[0, 0][:, None]
    expected = np.einsum("mgi,ogi->mo", wide, matrix) * [[1], [1], [0]]
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)
    assert not has_grouped_fp8_kernel(w)
    with pytest.raises(ValueError, match="implementation='pallas_gpu': the device is cpu, expected gpu"):
        grouped_matmul_fp8(*operands)


def test_no_rows_give_no_products() -> None:
    empty = grouped_matmul(jnp.zeros((0, WIDTH)), jnp.zeros((2, OUT, WIDTH)), jnp.zeros(2, jnp.int32))
    assert empty.shape == (0, OUT)


@pytest.mark.parametrize(
    ("target", "dtype", "widths", "name"),
    [
        (TPU, "bfloat16", (12, 20), "pallas_tpu"),
        (TPU, "float32", (12, 20), "pallas_tpu"),
        (TPU, "float16", (12, 20), "xla"),
        (CPU, "bfloat16", (64, 64), "xla"),
        (A100, "bfloat16", (64, 64), "xla"),
        (H200, "float32", (64, 64), "xla"),
        (H200, "bfloat16", (96, 64), "xla"),
    ],
)
def test_auto_takes_the_first_row_that_serves_the_call(
    target: Target, dtype: str, widths: tuple[int, int], name: str
) -> None:
    asked = GroupedProblem(target, dtype, widths, interpret=False)
    assert choose("auto", asked).__name__ == TABLE[name].function


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_hopper_gpu_has_its_kernel(dtype: str) -> None:
    asked = GroupedProblem(H200, dtype, (4096, 14336), interpret=False)
    assert choose("auto", asked).__name__ == "grouped_matmul_gpu"


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax is new enough")
def test_an_old_jax_is_named() -> None:
    with pytest.raises(ValueError, match=r"pallas_gpu': the Hopper kernels need jax >= 0.11, found 0\.10"):
        choose("pallas_gpu", GroupedProblem(H200, "bfloat16", (64, 64), interpret=False))


@pytest.mark.parametrize(
    ("target", "x_dtype", "w_dtype", "expected"),
    [
        (TPU, jnp.bfloat16, jnp.bfloat16, True),
        (TPU, jnp.bfloat16, jnp.float32, False),
        (H200, jnp.float32, jnp.float32, False),
        (CPU, jnp.float32, jnp.float32, False),
    ],
)
def test_whether_a_kernel_serves_a_call_and_what_is_said_once_where_none_does(
    target: Target, x_dtype: Any, w_dtype: Any, expected: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    dispatch._log_once.cache_clear()
    module = importlib.import_module("pallas_kernels.grouped_matmul")  # the package's name of it is the function's
    monkeypatch.setattr(module, "target", lambda: target)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert has_grouped_kernel(jnp.zeros((1, 64), x_dtype), jnp.zeros((1, 64, 64), w_dtype)) is expected
    assert len(caplog.records) == (target is H200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)), r"x is a list: expected an array \[M, I\]"),
        (
            (jnp.zeros((2, 4)), jnp.zeros((3, 4)), jnp.zeros(2, jnp.int32)),
            r"w has shape \(3, 4\): expected \[E, O, I\]",
        ),
        ((jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)), "x is int32: expected a float"),
        (
            (jnp.zeros((2, 4)), jnp.zeros((2, 3, 4), jnp.bfloat16), jnp.zeros(2, jnp.int32)),
            "w is bfloat16, x is float32",
        ),
        ((jnp.zeros((2, 5)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32)), "w has 4 inputs, x has 5: they must be"),
        ((jnp.zeros((2, 4)), jnp.zeros((2, 3, 4)), jnp.zeros(3, jnp.int32)), r"group_sizes is int32\[3\]: expected"),
        ((jnp.zeros((2, 4)), jnp.zeros((2, 3, 4)), jnp.zeros(2)), r"group_sizes is float32\[2\]: expected integers"),
    ],
)
def test_arrays_that_do_not_fit_are_named_in_one_line(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        unchecked(*arguments)
    assert "\n" not in str(caught.value)


def fp8_arguments(**other: Any) -> dict[str, Any]:
    """Of a call that fits, but for `other`."""
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((6, 256), jnp.float8_e4m3fn),
        "x_scale": ((6, 2), jnp.float32),
        "w": ((3, 128, 256), jnp.float8_e4m3fn),
        "w_scale": ((3, 1, 2), jnp.float32),
        "group_sizes": ((3,), jnp.int32),
    }
    return {name: jnp.zeros(*made) for name, made in shapes.items()} | other


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x_scale": jnp.zeros((6, 1))}, r"x_scale is float32\[6, 1\]: expected float32 \[6, 2\]"),
        ({"w_scale": jnp.zeros((3, 2, 1))}, r"w_scale is float32\[3, 2, 1\]: expected float32 \[3, 1, 2\]"),
        ({"x": jnp.zeros((6, 256), jnp.bfloat16)}, "w is float8_e4m3fn, x is bfloat16"),
        ({"implementation": "xla"}, "implementation='xla': expected one of pallas_gpu, reference"),
    ],
)
def test_arrays_in_eight_bits_that_do_not_fit_are_named_in_one_line(other: dict[str, Any], message: str) -> None:
    call: Any = getattr(grouped_matmul_fp8, "__wrapped__", grouped_matmul_fp8)
    assert call(**fp8_arguments(implementation="reference")).shape == (6, 128)
    with pytest.raises(ValueError, match=message) as caught:
        call(**fp8_arguments(**({"implementation": "reference"} | other)))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused for its age before")
def test_each_hopper_kernel_takes_its_own_dtypes() -> None:
    from pallas_kernels.grouped_dispatch import FP8_TABLE

    for table, name, taken, refused in (
        (TABLE, "grouped_matmul", "bfloat16", "float8_e4m3fn"),
        (FP8_TABLE, "grouped_matmul_fp8", "float8_e4m3fn", "bfloat16"),
    ):
        dispatch.choose(name, table, "pallas_gpu", GroupedProblem(H200, taken, (128, 128), False))
        with pytest.raises(ValueError, match=f"x is {refused}: this Hopper kernel takes"):
            dispatch.choose(name, table, "pallas_gpu", GroupedProblem(H200, refused, (128, 128), False))


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(ValueError, match="implementation='fast': expected one of auto, reference, xla, pallas_tpu"):
        unchecked(jnp.zeros((2, 4)), jnp.zeros((2, 3, 4)), jnp.zeros(2, jnp.int32), implementation="fast")
