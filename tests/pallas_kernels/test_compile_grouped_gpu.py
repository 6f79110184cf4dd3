"""The Hopper kernels of grouped_matmul compiled to machine code for an H200 that is not here. Nothing is run."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gpu.grouped_plan import plan_gradient, plan_product
from pallas_kernels.gpu.tiles import SHARED_MEMORY_LIMIT

from .test_compile_gpu import reports

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plugin is missing"),
    pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="the nvidia compiler wheels are missing"),
]
PROGRAMS = 132  # of an H200


@dataclasses.dataclass(frozen=True)
class Shape:
    """One product: rows of all experts, experts, outputs, inputs."""

    M: int
    E: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    dtype: str = "bfloat16"

    def operands(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        x, w, d_out = ((self.M, self.I), (self.E, self.O, self.I), (self.M, self.O))
        arrays = (jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in (x, w, d_out))
        return *arrays, jax.ShapeDtypeStruct((self.E,), jnp.int32)


# Rows of 8192 tokens, and of decoding: one token, and as many as have 16 rows for each expert.
MIXTRAL = [Shape(M, 8, *widths) for widths in ((14336, 4096), (4096, 14336)) for M in (16384, 128, 2)]
LARGE_3 = [Shape(M, 128, *widths) for widths in ((4096, 7168), (7168, 4096)) for M in (32768, 512)]

NARROW = Shape(512, 4, 128, 192)  # inputs an odd multiple of 64, outputs of 128


def product(operands: Any) -> Any:
    from pallas_kernels.gpu.grouped import grouped_matmul_gpu

    x, w, _, sizes = operands
    return grouped_matmul_gpu(x, w, sizes)


def gradient_of_x(operands: Any) -> Any:
    from pallas_kernels.gpu.grouped import _product

    _, w, d_out, sizes = operands
    return _product(False, d_out, w, sizes, turned=True)


def gradient_of_w(operands: Any) -> Any:
    from pallas_kernels.gpu.grouped import _weights

    x, _, d_out, sizes = operands
    return _weights(False, d_out, x, sizes)


def product_of_eight_bits(operands: Any) -> Any:
    from pallas_kernels.gpu.grouped import grouped_matmul_fp8_gpu

    return grouped_matmul_fp8_gpu(*operands)


def check(report: str, width: int) -> None:
    """No spilled byte; warpgroup products of the tile's width and no others, asynchronous, one left running."""
    check_registers(report)
    products = re.findall(r"\bHGMMA\.(\S+)\.F32", report)
    assert set(products) == {f"64x{width}x16"}
    assert len(products) in (8, 12)  # four for a step, which stands in the code before the loop, in it and behind it
    loop = report[report.index("HGMMA") : report.rindex("DEPBAR.LE gsb0, 0x0")]
    assert "DEPBAR.LE gsb0, 0x1" in loop


def check_registers(report: str) -> None:
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")]
    assert not re.search(r"\b(LDL|STL|HMMA)\b", report)
    assert "wgmma.mma_async instructions are serialized" not in report


def step_is_bare(report: str) -> bool:
    """Whether the loop holds no move or conversion of a sum, between its first product and its last wait."""
    loop = report[report.index("HGMMA") : report.index("DEPBAR.LE gsb0, 0x1")]
    return not re.search(r"\b(F2F|F2FP|FADD|FMUL|STSM|STS)\b", loop)


@pytest.mark.parametrize("shape", [*MIXTRAL, *LARGE_3, Shape(16384, 8, 14336, 4096, "float16")], ids=str)
def test_products_compile_without_spills(shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    plan = plan_product(shape.M, shape.E, shape.O, PROGRAMS)
    assert plan.bytes_needed <= SHARED_MEMORY_LIMIT
    report = reports(product, shape.operands(), monkeypatch, capfd)
    check(report, plan.columns)
    assert step_is_bare(report)
    assert "tnsp" not in report  # both operands lie as the tensor cores read them


@pytest.mark.parametrize("shape", [MIXTRAL[0], MIXTRAL[3], LARGE_3[0]], ids=str)
def test_the_gradient_by_rows_reads_the_matrices_as_they_lie(
    shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    report = reports(gradient_of_x, shape.operands(), monkeypatch, capfd)
    check(report, plan_product(shape.M, shape.E, shape.I, PROGRAMS).columns)
    assert step_is_bare(report)
    assert set(re.findall(r"\.tnsp\w", report)) == {".tnspB"}


@pytest.mark.parametrize("shape", [MIXTRAL[0], MIXTRAL[3], LARGE_3[0], NARROW], ids=str)
def test_the_gradient_by_matrices_compiles_without_spills(
    shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    plan = plan_gradient(shape.O, shape.I, PROGRAMS)
    assert plan.bytes_needed <= SHARED_MEMORY_LIMIT
    check(reports(gradient_of_w, shape.operands(), monkeypatch, capfd), plan.columns)


@pytest.mark.parametrize("shape", [*LARGE_3, MIXTRAL[3], MIXTRAL[5]], ids=str)
def test_products_of_eight_bits_are_those_of_the_tensor_cores(
    shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """e4m3 as it lies: nothing is converted to 16 bits, and a step is four products of 32 inputs."""
    plan = plan_product(shape.M, shape.E, shape.O, PROGRAMS, widest=128)
    assert plan.bytes_needed <= SHARED_MEMORY_LIMIT
    blocks, eight, float32 = shape.I // 128, jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float32)
    operands = (
        jax.ShapeDtypeStruct((shape.M, shape.I), eight),
        jax.ShapeDtypeStruct((shape.M, blocks), float32),
        jax.ShapeDtypeStruct((shape.E, shape.O, shape.I), eight),
        jax.ShapeDtypeStruct((shape.E, shape.O // 128, blocks), float32),
        jax.ShapeDtypeStruct((shape.E,), jnp.dtype(jnp.int32)),
    )
    report = reports(product_of_eight_bits, operands, monkeypatch, capfd)
    check_registers(report)
    assert re.findall(r"\bQGMMA\.(\S+)", report) == [f"64x{plan.columns}x32.F32.E4M3.E4M3"] * 4
    assert "HGMMA" not in report


def test_no_matrix_is_copied_on_its_way_to_the_product() -> None:
    """Beside the arguments and the result there are the result before its mask, and the tables of tiles."""
    from pallas_kernels.gpu.ahead_of_time import compile_for_h200

    shape = Shape(512, 8, 4096, 14336)
    memory: Any = compile_for_h200(product, shape.operands()).memory_analysis()
    assert memory.argument_size_in_bytes > 2 * shape.E * shape.O * shape.I
    assert memory.temp_size_in_bytes < 2 * shape.M * shape.O + 100_000
