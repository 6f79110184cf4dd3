"""Which implementation serves a call of flash_attention, and what is said when one is passed over or refused."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, flash_attention
from pallas_kernels.dispatch import Target
from pallas_kernels.flash_dispatch import TABLE, FlashProblem

CPU, TPU, H200, A100 = (
    Target("cpu", "cpu"),
    Target("tpu", "TPU v6 lite"),
    Target("gpu", "NVIDIA H200"),
    Target("gpu", "NVIDIA A100-SXM4-80GB"),
)


def problem(target: Target, dtype: str = "bfloat16", **changes: Any) -> FlashProblem:
    plain = FlashProblem(target, dtype, (128, 128), (64, 64), 0, segmented=False, return_lse=False, interpret=False)
    return plain._replace(**changes)


choose = functools.partial(dispatch.choose, "flash_attention", TABLE)


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> None:
    dispatch._log_once.cache_clear()


@pytest.mark.parametrize(
    ("target", "dtype", "name"),
    [
        (TPU, "bfloat16", "pallas_tpu"),
        (TPU, "float32", "pallas_tpu"),
        (TPU, "float16", "xla"),
        (CPU, "bfloat16", "xla"),
        (A100, "bfloat16", "xla"),
        (H200, "float32", "xla"),
    ],
)
def test_auto_takes_the_first_row_that_serves_the_call(target: Target, dtype: str, name: str) -> None:
    assert choose("auto", problem(target, dtype)).__name__ == TABLE[name].function


def test_a_fall_back_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            choose("auto", problem(TPU, "float16"))
    (record,) = caplog.records
    assert "pallas_tpu is passed over: q is float16, expected bfloat16 or float32" in record.message


def test_the_ordinary_choice_on_a_cpu_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    choose("auto", problem(CPU))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("pallas_tpu", problem(CPU), "'pallas_tpu': the device is cpu, expected tpu; interpret=True runs it here"),
        ("pallas_tpu", problem(TPU, "float16"), "q is float16, expected bfloat16 or float32"),
        ("pallas_gpu", problem(TPU), "the device is tpu, expected gpu"),
        ("pallas_gpu", problem(H200, "float32"), "q is float32, expected bfloat16 or float16"),
        ("cudnn", problem(H200, segmented=True), "segment_ids are given, expected none"),
        ("cudnn", problem(H200, lengths=(8, 64)), "T=8, S=64, query_offset=0: expected T = S and offset 0"),
        ("cudnn", problem(H200, offset=None), "query_offset=None: expected T = S and offset 0"),
        ("cudnn", problem(H200, widths=(192, 128)), "v has head width 128, q has 192"),
        ("cudnn", problem(H200, return_lse=True), "return_lse is set, expected False"),
        ("cudnn", problem(CPU), "the device is cpu, expected gpu"),
        ("xla", problem(CPU, interpret=True), "interpret is set, which only the Pallas kernels have"),
        ("auto", problem(CPU, interpret=True), "name a Pallas kernel"),
    ],
)
def test_what_a_row_refuses_is_said(name: str, asked: FlashProblem, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(name, asked)


def test_the_interpreted_tpu_kernel_is_one_argument_away() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, n, 8)), jnp.float32) for n in (4, 2, 2))
    run = functools.partial(flash_attention, window=4, implementation="pallas_tpu", interpret=True)
    got = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(q, k, v)
    np.testing.assert_allclose(got, flash_attention(q, k, v, window=4, implementation="reference"), atol=2e-5)


def test_compiling_for_an_absent_tpu_counts_as_tpu() -> None:
    device = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert dispatch.target() == TPU
    assert dispatch.target().platform == "cpu"
