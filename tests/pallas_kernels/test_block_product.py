"""The product with scaled e4m3 blocks against float64, block by block, interpreted; and compiled for the chips."""

from __future__ import annotations

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu.block_product import block_product

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def operands(rows: int, n_out: int, n_in: int) -> tuple[np.ndarray, ...]:
    """Rows, a scale for each of them and each group, a matrix of e4m3 numbers, a scale for each block."""
    rng = np.random.default_rng((rows, n_out, n_in))
    x = rng.standard_normal((rows, n_in)).astype(np.float32)
    payload = np.asarray(jnp.asarray(rng.standard_normal((n_out, n_in)), jnp.float8_e4m3fn))
    scales = (rng.uniform(0.1, 2.0, shape).astype(np.float32) for shape in
              ((rows, n_in // 128), (n_out // 128, n_in // 128)))  # fmt: skip
    return x, next(scales), payload, next(scales)


@pytest.mark.parametrize(("rows", "n_out", "n_in"), [(1, 128, 256), (5, 640, 384), (300, 1024, 128)])
@pytest.mark.parametrize("rounded", [True, False])
def test_every_block_has_its_own_scale(rows: int, n_out: int, n_in: int, rounded: bool) -> None:
    """Rows that fill no tile, rows for two steps, blocks of rows that are one, two and four to a step."""
    x, x_scale, payload, scale = operands(rows, n_out, n_in)
    matrix = payload.astype(np.float64) * np.kron(scale, np.ones((128, 128)))
    scaled = x * np.repeat(x_scale, 128, axis=1) if rounded else x
    expected = scaled.astype(np.float64) @ matrix.T
    given = jnp.asarray(x_scale) if rounded else None
    found = block_product(jnp.asarray(x), given, jnp.asarray(payload), jnp.asarray(scale), interpret=True)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-6 * np.ptp(expected)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("rows", "n_out", "n_in"), [(4, 7168, 16384), (512, 4096, 7168), (16, 512, 7168), (512, 5120, 32768)]
)
def test_it_compiles_and_copies_nothing(chip, rows: int, n_out: int, n_in: int) -> None:
    """Of a loop too, where XLA hoists copies of what it would rather have in another order."""
    from pallas_kernels.tpu.ahead_of_time import compile_for

    def loop(x, x_scale, payload, scale, steps):
        def step(_, x):
            out = block_product(x, x_scale, payload, scale)
            return x + jnp.sum(out, axis=1, keepdims=True).astype(x.dtype)

        return jax.lax.fori_loop(0, steps, step, x)

    struct = jax.ShapeDtypeStruct
    compiled = compile_for(
        chip, loop, struct((rows, n_in), jnp.bfloat16), struct((rows, n_in // 128), jnp.float32),
        struct((n_out, n_in), jnp.float8_e4m3fn), struct((n_out // 128, n_in // 128), jnp.float32),
        struct((), jnp.int32),
    )  # fmt: skip
    assert compiled.memory_analysis().temp_size_in_bytes < n_out * n_in / 8 + 8 * rows * n_out
