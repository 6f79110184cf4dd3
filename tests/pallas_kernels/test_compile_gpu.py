"""The Hopper kernels compiled to machine code for an H200 that is not here. Nothing is run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plugin is missing"),
    pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="the nvidia compiler wheels are missing"),
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compilation: widths, window, dtype, and whether sequences are packed."""

    H: int = 128
    Hv: int = 128
    window: int | None = 4096
    dtype: Any = jnp.bfloat16
    packed: bool = False

    def struct(self, *shape: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype or self.dtype)


T, N, K = 8192, 32, 8
BEYOND_128 = ((192, 128), (192, 192), (256, 256))


def kernel_call(kernel: str, shape: Shape) -> tuple[Callable[..., Any], Any]:
    """The kernel with its production tiles, and its operands as shapes."""
    from pallas_kernels.gpu import flash_backward_key, flash_backward_query, flash_forward
    from pallas_kernels.gpu.extent import Extent
    from pallas_kernels.gpu.spans import Spans
    from pallas_kernels.gpu.tiles import TILES

    tiles, int32, float32 = TILES[shape.H, shape.Hv], jnp.int32, jnp.float32
    q, k, v = shape.struct(1, T, N, shape.H), shape.struct(1, T, K, shape.H), shape.struct(1, T, K, shape.Hv)
    d_out, row = shape.struct(1, T, N, shape.Hv), shape.struct(1, N, T, dtype=float32)
    offset = shape.struct(1, dtype=int32)
    spans = Spans(*(shape.struct(1, n, dtype=int32) for n in (T, T, T // 64, T // 32))) if shape.packed else None
    settings = {"extent": Extent(shape.window, T, T), "scale": shape.H**-0.5, "interpret": False}
    backward = flash_backward_query.Operands(q, k, v, d_out, row, row, offset, spans)
    function, operands, pipeline = {
        "forward": (flash_forward.flash_forward, flash_forward.Operands(q, k, v, offset, spans), tiles.forward),
        "dq": (flash_backward_query.flash_backward_query, backward, tiles.query),
        "dk, dv": (flash_backward_key.flash_backward_key, backward, tiles.key),
        "dk": (functools.partial(flash_backward_key.flash_backward_key, sums="keys"), backward, tiles.key),
        "dv": (functools.partial(flash_backward_key.flash_backward_key, sums="values"), backward, tiles.value),
    }[kernel]
    assert pipeline is not None, f"there is no {kernel} kernel of these widths"
    return lambda operands: function(operands, block=pipeline.block, stages=pipeline.stages, **settings), operands


def reports(call: Callable[..., Any], operands: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> str:
    """What the assembler said about the kernel, and its machine code, both as text."""
    from pallas_kernels.gpu.ahead_of_time import compile_for_h200

    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")
    capfd.readouterr()
    compile_for_h200(call, operands)
    return capfd.readouterr().out


def check(report: str, overlapped: bool = True) -> None:
    """No spilled byte, warpgroup products and no others, all of them asynchronous, with exponentials under them."""
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report) == [
        ("0", "0", "0")
    ]
    assert len(re.findall(r"\bHGMMA\b", report)) >= 32
    assert not re.search(r"\bHMMA\b", report)
    assert not re.search(r"\b(LDL|STL)\b", report)
    assert "wgmma.mma_async instructions are serialized" not in report
    under, total = exponentials(report)
    assert total >= 16
    assert not overlapped or under >= total / 2, f"{under} of {total} exponentials run while a product does"


def exponentials(report: str) -> tuple[int, int]:
    """How many exponentials stand between a wait that leaves products running and the next wait, and how many in all.

    The assembler moves waits as well as arithmetic: the order in the source does not show what overlaps.
    """
    under = total = 0
    running = False
    for instruction in re.findall(r"\bDEPBAR\.LE gsb0, 0x[0-9]|\bMUFU\.EX2", report):
        if instruction.startswith("DEPBAR"):
            running = not instruction.endswith("0x0")
        else:
            total, under = total + 1, under + running
    return under, total


@pytest.mark.parametrize("kernel", ["forward", "dq", "dk, dv"])
@pytest.mark.parametrize("shape", [Shape(), Shape(window=None), Shape(packed=True)], ids=str)
def test_the_kernels_of_width_128_compile_without_spills(
    shape: Shape, kernel: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    check(reports(*kernel_call(kernel, shape), monkeypatch, capfd))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        *((Shape(width, width), kernel) for width in (64, 96) for kernel in ("forward", "dq", "dk, dv")),
        *((Shape(*widths), kernel) for widths in BEYOND_128 for kernel in ("forward", "dq", "dk", "dv")),
        *((Shape(*widths, packed=True), kernel) for widths in BEYOND_128[:1] for kernel in ("dq", "dk", "dv")),
        *((Shape(dtype=jnp.float16), kernel) for kernel in ("forward", "dq", "dk, dv")),
    ],
    ids=str,
)
def test_every_width_compiles_without_spills(
    shape: Shape, kernel: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    # The kernel of dV alone has one product before its exponentials and one after: nothing to run under.
    check(reports(*kernel_call(kernel, shape), monkeypatch, capfd), overlapped=kernel != "dv")


def test_the_budgets_hold_what_a_block_of_threads_may_use() -> None:
    from pallas_kernels.gpu.tiles import SHARED_MEMORY_LIMIT, TILES

    for widths, tiles in TILES.items():
        assert max(tiles.bytes_needed(*widths).values()) <= SHARED_MEMORY_LIMIT, widths
