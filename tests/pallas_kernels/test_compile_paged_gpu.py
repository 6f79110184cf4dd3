"""The Hopper kernel of paged_attention compiled to machine code for an H200 that is not here. Nothing is run."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from .test_compile_gpu import exponentials, reports

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plugin is missing"),
    pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="the nvidia compiler wheels are missing"),
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One compilation: packed tokens, sequences, page, window, heads, widths, dtypes; tables of 256k tokens."""

    T: int
    B: int
    page: int = 128
    window: int | None = 4096
    N: int = 32
    K: int = 8
    H: int = 128
    Hv: int = 128
    dtype: str = "bfloat16"
    pool: str | None = None
    positions: int = 262_144

    def call(self) -> tuple[Callable[..., Any], Any]:
        """The entry point and its array arguments as shapes."""
        from pallas_kernels.gpu.paged import paged_attention_gpu

        def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        pool, pages = self.pool or self.dtype, self.positions // self.page
        factor = array("float32", self.K) if self.pool else None
        arrays = (
            array(self.dtype, self.T, self.N, self.H),
            array(pool, self.B * pages // 8, self.page, self.K, self.H),
            array(pool, self.B * pages // 8, self.page, self.K, self.Hv),
            array("int32", self.B, pages),
            array("int32", self.B + 1),
            array("int32", self.B),
        )
        settings: dict[str, Any] = {"window": self.window, "scale": self.H**-0.5}

        def attend(arguments: Any) -> Any:
            return paged_attention_gpu(*arguments[:6], k_scale=arguments[6], v_scale=arguments[7], **settings)

        return attend, (*arrays, factor, factor)


def check(report: str) -> None:
    """No spilled byte, asynchronous warpgroup products and no others, half of all exponentials under them."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")]
    assert len(re.findall(r"\bHGMMA\b", report)) >= 24
    assert not re.search(r"\bHMMA\b", report)
    assert not re.search(r"\b(LDL|STL)\b", report)
    assert "wgmma.mma_async instructions are serialized" not in report
    under, total = exponentials(report)
    assert under >= total / 2 > 0, f"{under} of {total} exponentials run while a product does"


@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 64, page=16, window=None),
        Shape(64, 64, page=128, window=4096),
        Shape(1, 1, page=64, window=32_768),
        Shape(64, 64, page=16, window=None, pool="int8"),
        Shape(8, 8, page=256, window=4096, pool="float8_e4m3fn"),
        Shape(2048, 64, page=16, window=4096),
        Shape(8192, 1, page=256, window=None),
    ],
    ids=str,
)
def test_decoding_and_prompts_compile_without_spills(shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    check(reports(*shape.call(), monkeypatch, capfd))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(T, 8, H=width, Hv=width) for width in (64, 96, 192, 256) for T in (8, 4096)),
        *(Shape(8, 8, H=width, Hv=width, pool=pool) for width in (64, 96) for pool in ("int8", "float8_e4m3fn")),
        *(Shape(T, 8, H=192, Hv=128, window=None) for T in (8, 4096)),
        *(Shape(T, 8, dtype="float16") for T in (8, 4096)),
        *(Shape(T, 8, N=N, window=None) for N in (8, 40, 96) for T in (8, 4096)),
        *(Shape(T, 8, page=page, window=window) for page in (16, 64) for window in (None, 32_768) for T in (8, 4096)),
        Shape(256, 8, pool="int8"),
    ],
    ids=str,
)
def test_every_width_page_and_group_compiles_without_spills(
    shape: Shape, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    check(reports(*shape.call(), monkeypatch, capfd))
