"""Which implementation serves a call of paged_attention, and what is said when one is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Target
from pallas_kernels.paged_dispatch import TABLE, PagedProblem

CPU, TPU, H200, A100 = (
    Target("cpu", "cpu"),
    Target("tpu", "TPU v6 lite"),
    Target("gpu", "NVIDIA H200"),
    Target("gpu", "NVIDIA A100-SXM4-80GB"),
)

choose = functools.partial(dispatch.choose, "paged_attention", TABLE)


def problem(target: Target, **changes: Any) -> PagedProblem:
    plain = PagedProblem(
        target=target,
        dtype="bfloat16",
        pool_dtype="bfloat16",
        widths=(128, 128),
        heads=(32, 8),
        page=64,
        rows=64,
        sequences=64,
        table_width=2048,
        latent=False,
        interpret=False,
    )
    return plain._replace(**changes)


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (problem(TPU), "pallas_tpu"),
        (problem(TPU, dtype="float32", pool_dtype="float32"), "pallas_tpu"),
        (problem(TPU, latent=True), "xla"),
        (problem(H200, dtype="float32"), "xla"),
        (problem(A100), "xla"),
        (problem(CPU), "xla"),
        (problem(CPU, pool_dtype="int8"), "xla"),
    ],
)
def test_auto_takes_the_first_row_that_serves_the_call(problem: PagedProblem, name: str) -> None:
    assert choose("auto", problem).__name__ == TABLE[name].function


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("pallas_tpu", problem(CPU), "'pallas_tpu': the device is cpu, expected tpu; interpret=True runs it here"),
        ("pallas_tpu", problem(TPU, dtype="float16"), "q is float16, expected bfloat16 or float32"),
        ("pallas_tpu", problem(TPU, latent=True), "v_pages is None, the kernel reads values from pages of their own"),
        ("pallas_gpu", problem(A100), "the device is 'NVIDIA A100-SXM4-80GB', the kernel is written for Hopper"),
        ("pallas_gpu", problem(H200, latent=True), "v_pages is None"),
        ("xla", problem(CPU, interpret=True), "interpret is set, which only the Pallas kernels have"),
    ],
)
def test_what_a_row_refuses_is_said(name: str, asked: PagedProblem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, asked)
