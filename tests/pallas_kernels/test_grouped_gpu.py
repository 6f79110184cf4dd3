"""The grouped product on Hopper, interpreted on the CPU with race detection, against formulas in float64."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, grouped_matmul_fp8
from pallas_kernels.gpu.grouped_plan import GroupedPlan, plan_product, visits

from .race_records import Detectors, of_gpu_kernels

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}  # largest relative error of a result that is rounded once


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: rows, groups, widths."""

    sizes: tuple[int, ...]
    M: int
    O: int = 128  # noqa: E741
    I: int = 64  # noqa: E741
    dtype: str = "bfloat16"

    @property
    def groups(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, w and the gradient of the result: NaN in rows of no group."""
        rng = np.random.default_rng(0)
        x, w, d_out = (
            rng.normal(scale=0.3, size=shape)
            for shape in ((self.M, self.I), (len(self.sizes), self.O, self.I), (self.M, self.O))
        )
        x[len(self.groups) :] = d_out[len(self.groups) :] = np.nan
        return jnp.asarray(x, self.dtype), jnp.asarray(w, self.dtype), jnp.asarray(d_out, self.dtype)


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> Detectors:
    return of_gpu_kernels(monkeypatch)


def formulas(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product, and the gradients of x and w, row by row in float64."""
    x, w, d_out = (np.asarray(array, np.float64) for array in case.arrays())
    out, d_x, d_w = np.zeros((case.M, case.O)), np.zeros(x.shape), np.zeros(w.shape)
    for row, group in enumerate(case.groups):
        out[row], d_x[row] = w[group] @ x[row], d_out[row] @ w[group]
        d_w[group] += np.outer(d_out[row], x[row])
    return out, d_x, d_w


def assert_rounded(found: jax.Array, expected: np.ndarray, dtype: str) -> None:
    """As exact as a result can be that was summed in float32 and rounded once."""
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - expected)
    assert (error <= ROUNDING[dtype] * np.abs(expected) + 1e-6 * max(np.abs(expected).max(), 1)).all()


def product(x: Any, w: Any, sizes: Any) -> jax.Array:
    return grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), implementation="pallas_gpu", interpret=True)


CASES = [
    pytest.param(Case((5, 0, 70, 1), 90), id="an empty group, one row, a remainder in no group"),
    pytest.param(Case((0, 0, 64), 64, O=192), id="all rows in the last group, a whole tile"),
    pytest.param(Case((3, 2), 5, I=192), id="fewer rows than a tile"),
    pytest.param(Case((150, 57), 207), id="two consumers, groups that are no multiples of anything"),
    pytest.param(Case((0, 130), 256, O=64, dtype="float16"), id="two consumers, float16, a tile past the rows"),
    pytest.param(Case((0, 0, 0), 70), id="no row in any group"),
]


@pytest.mark.parametrize("case", CASES)
def test_products_equal_the_formula_and_empty_groups_are_not_read(case: Case, detectors: Detectors) -> None:
    x, w, _ = case.arrays()
    w = jnp.where(jnp.asarray(case.sizes)[:, None, None] > 0, w, jnp.nan)
    assert_rounded(product(x, w, case.sizes), formulas(case)[0], case.dtype)
    assert detectors
    assert not detectors.races_found


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_formulas(case: Case, detectors: Detectors) -> None:
    """Of x, by the matrices as they lie; of w, zeros for empty groups. NaN in rows of no group goes nowhere."""
    x, w, d_out = case.arrays()
    _, pull = jax.vjp(lambda x, w: product(x, w, case.sizes), x, w)
    for found, expected in zip(pull(d_out), formulas(case)[1:], strict=True):
        assert_rounded(found, expected, case.dtype)
    assert len(detectors) == 3
    assert not detectors.races_found


def eight_bits(sizes: tuple[int, ...], M: int, O: int, I: int) -> tuple[tuple[Any, ...], np.ndarray]:  # noqa: E741
    """Operands of grouped_matmul_fp8 with scales far apart, and the product in float64. Rows of no group are NaN."""
    rng, blocks = np.random.default_rng(0), I // 128
    x, w = rng.normal(size=(M, I)), rng.normal(size=(len(sizes), O, I))
    x[sum(sizes) :] = np.nan
    x_scale = np.exp(rng.normal(size=(M, blocks))).astype(np.float32)
    w_scale = np.exp(rng.normal(size=(len(sizes), O // 128, blocks))).astype(np.float32)
    x8, w8 = jnp.asarray(x, jnp.float8_e4m3fn), jnp.asarray(w, jnp.float8_e4m3fn)
    wide_x = np.asarray(x8, np.float64) * np.repeat(x_scale, 128, axis=1)
    wide_w = np.asarray(w8, np.float64) * np.repeat(np.repeat(w_scale, 128, axis=1), 128, axis=2)
    out = np.zeros((M, O))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[row] = wide_w[group] @ wide_x[row]
    return (x8, jnp.asarray(x_scale), w8, jnp.asarray(w_scale), jnp.asarray(sizes, jnp.int32)), out


@pytest.mark.parametrize(
    ("sizes", "M", "O", "I"),
    [
        pytest.param((5, 0, 70, 1), 90, 128, 384, id="few rows, an empty group, a remainder"),
        pytest.param((150, 57), 207, 256, 256, id="two consumers, two blocks of outputs"),
    ],
)
def test_products_of_eight_bits_equal_the_formula(
    sizes: tuple[int, ...],
    M: int,
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    detectors: Detectors,
) -> None:
    """Every block with its own scales; matrices of empty groups, which are NaN, are not read."""
    (x, x_scale, w, w_scale, group_sizes), expected = eight_bits(sizes, M, O, I)
    w = jnp.where(group_sizes[:, None, None] > 0, w, jnp.nan).astype(w.dtype)
    found = grouped_matmul_fp8(x, x_scale, w, w_scale, group_sizes, interpret=True)
    assert_rounded(found, expected, "bfloat16")
    assert detectors
    assert not detectors.races_found


@pytest.mark.parametrize("argnums", [0, 1], ids=["x", "w"])
def test_frozen_matrices_have_no_gradient(argnums: int) -> None:
    """Under a scan whose steps are computed again, as training has it."""
    from pallas_kernels.gpu.grouped import grouped_matmul_gpu

    case = Case((5, 60), 65)
    x, w, _ = case.arrays()

    def loss(x: Any, w: Any) -> Any:
        step = jax.checkpoint(lambda x, w: (x + grouped_matmul_gpu(x, w, jnp.asarray(case.sizes))[:, : case.I], None))
        return jax.lax.scan(step, x, jnp.stack([w, w]))[0].sum()

    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200)):
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(x, w))
    assert ("grouped_weights" in text) is (argnums == 1)


def loads(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for every copy into shared memory that is really made from now on."""
    callbacks: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    made: list[None] = []
    real = callbacks.copy_gmem_to_smem

    def counted(*args: Any, **options: Any) -> Any:
        made.append(None)
        return real(*args, **options)

    monkeypatch.setattr(callbacks, "copy_gmem_to_smem", counted)
    return made


@pytest.mark.parametrize("sizes", [(5, 0, 70, 1), (64, 1, 64, 0), (0, 0, 0, 3)])
def test_the_tiles_that_are_visited_are_those_that_hold_rows(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of s rows takes ceil(s / 64) tiles of rows; a step of one loads a block of x and one of w."""
    case = Case(sizes, 140, O=128, I=192)
    x, w, _ = case.arrays()
    plan = plan_product(case.M, len(sizes), case.O, 2)
    made = loads(monkeypatch)
    jax.block_until_ready(product(x, w, sizes))
    row_tiles = sum(-(-size // 64) for size in sizes)
    assert plan.rows == 64
    assert len(made) == 2 * row_tiles * (case.O // plan.columns) * (case.I // 64)


class Bug:
    """Ways to break the pipeline. Each returns what it replaces, in the module and class that kernels find it in."""

    @staticmethod
    def not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
        from pallas_kernels.gpu.grouped_program import Ring

        monkeypatch.setattr(Ring, "await_loaded", lambda self, n: None)

    @staticmethod
    def released_early(monkeypatch: pytest.MonkeyPatch) -> None:
        from pallas_kernels.gpu.grouped_program import Ring

        real, wait = Ring.release, Ring.await_loaded
        monkeypatch.setattr(Ring, "release", lambda self, n: None)
        monkeypatch.setattr(Ring, "await_loaded", lambda self, n: (wait(self, n), real(self, n)))

    @staticmethod
    def stored_over(monkeypatch: pytest.MonkeyPatch) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        real = plgpu.wait_smem_to_gmem
        monkeypatch.setattr(plgpu, "wait_smem_to_gmem", lambda n, wait_read_only=False: None if n else real(0))

    @staticmethod
    def clearing_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
        from jax.experimental.pallas import mosaic_gpu as plgpu

        from pallas_kernels.gpu import grouped_weights

        real, wait = grouped_weights._clear_strangers, plgpu.barrier_wait

        def broken(shared: Any, *args: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plgpu, "barrier_wait", lambda ref: None if ref is shared.cleared else wait(ref))
                real(shared, *args)

        monkeypatch.setattr(grouped_weights, "_clear_strangers", broken)


def results(kernel: str) -> tuple[Any, np.ndarray]:
    """What a kernel computes and what it should, with several tiles for each program and slots that are reused."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import grouped_forward, grouped_weights

    interpret = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=32)  # pyright: ignore[reportAttributeAccessIssue]
    case = Case((150, 57), 208, O=128, I=256)
    x, w, d_out = case.arrays()
    sizes, plan = jnp.asarray(case.sizes), GroupedPlan(128, 128, 2, 2)
    product, _, d_w = formulas(case)
    if kernel == "product of eight bits":
        (x, x_scale, w, w_scale, sizes), expected = eight_bits(case.sizes, case.M, 128, 256)
        padded = jnp.pad(x_scale.T, ((0, 0), (0, 128)))
        operands = grouped_forward.Operands(
            x, w, visits(sizes, case.M, plan.rows), grouped_forward.Scales(padded, w_scale)
        )
        found = grouped_forward.grouped_forward(operands, plan=plan, turned=False, interpret=interpret)
        return found[: len(case.groups)], expected[: len(case.groups)]
    if kernel == "product":
        operands = grouped_forward.Operands(x, w, visits(sizes, case.M, plan.rows))
        found = grouped_forward.grouped_forward(operands, plan=plan, turned=False, interpret=interpret)
        return found[: len(case.groups)], product[: len(case.groups)]
    stops = jnp.cumsum(sizes)
    operands = grouped_weights.Operands(d_out, x, stops - sizes, stops)
    return grouped_weights.grouped_weights(operands, plan=plan, interpret=interpret), d_w


def caught(kernel: str) -> bool:
    """Whether running the kernel shows a race, a barrier that ends out of step, or a wrong result."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    try:
        found, expected = results(kernel)
        found = np.asarray(found, np.float64)
    except Exception as error:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "arrier" not in str(error):
            raise
        return True
    return interpret_pallas_call.get_races().races_found or not np.allclose(found, expected, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("kernel", ["product", "product of eight bits", "gradient of w"])
@pytest.mark.parametrize("bug", [Bug.not_awaited, Bug.released_early, Bug.stored_over])
def test_a_planted_pipeline_bug_is_caught(
    kernel: str, bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    assert caught(kernel)


def test_products_with_rows_that_the_other_consumer_still_clears_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    Bug.clearing_not_awaited(monkeypatch)
    assert caught("gradient of w")


@pytest.mark.parametrize("kernel", ["product", "product of eight bits", "gradient of w"])
def test_nothing_is_caught_where_no_bug_was_planted(kernel: str) -> None:
    assert not caught(kernel)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        (jnp.zeros((4, 64)), jnp.zeros((1, 64, 64)), "x is float32: this Hopper kernel takes bfloat16 or float16"),
        (jnp.zeros((4, 96), jnp.bfloat16), jnp.zeros((1, 64, 96), jnp.bfloat16), r"widths \(in, out\) are \(96, 64\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_one_line(x: Any, w: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught_error:
        product(x, w, [4])
    assert "\n" not in str(caught_error.value)
