"""A quantised projection over eight simulated devices is the one on one device, and sends nothing but its answer."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ministral_jax.linear import Linear
from ministral_jax.parameters import fill, parameter_specs
from ministral_jax.quantization import LinearFormat
from ministral_jax.quantization.encoding import encode
from ministral_jax.sharding.layout import layout_for, token_axes
from ministral_jax.sharding.meshes import make_mesh
from tests.checkpoint_files import tiny_config

COLLECTIVES = re.compile(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
STORED = LinearFormat("fp8_block", "dynamic")


def run(mesh: str | None, axes: tuple[str, str], shape: tuple[int, int], x: np.ndarray) -> tuple[np.ndarray, Counter]:
    """The product, and the collectives of its program."""
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    linear = Linear(*shape, axes, jnp.float32)
    linear.store_as(STORED)
    layout = None if mesh is None else layout_for(tiny_config(n_heads=8), make_mesh(mesh))
    linear.layout = layout
    arrays = dict(encode(jnp.asarray(matrix), STORED))
    if layout is not None:
        specs = parameter_specs(linear)
        arrays = {name: jax.device_put(array, layout.placement(name, specs[name])) for name, array in arrays.items()}
    graph, weights = nnx.split(fill(linear, arrays))
    given = x if layout is None else layout.put(x, *token_axes(x.shape[:-1], layout), None)
    program = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x)).lower(weights, given).compile()
    return np.asarray(program(weights, given)), Counter(COLLECTIVES.findall(program.as_text() or ""))


@pytest.mark.parametrize(
    ("mesh", "axes", "shape", "collectives"),
    [
        ("data=2,tensor=4", ("heads", "rank"), (1024, 384), {}),
        ("data=2,tensor=4", ("embed", "hidden"), (384, 1024), {"all-reduce": 1}),
        ("expert=4,tensor=2", ("embed", "hidden"), (384, 1024), {"all-reduce": 1}),
    ],
)
@pytest.mark.parametrize("tokens", [(8,), (8, 3)])
def test_devices_multiply_with_the_rows_or_columns_that_they_have(mesh, axes, shape, collectives, tokens):
    x = np.random.default_rng(1).standard_normal((*tokens, shape[1])).astype(np.float32)
    expected, _ = run(None, axes, shape, x)
    found, sent = run(mesh, axes, shape, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    assert sent == collectives


def test_a_matrix_that_would_be_cut_within_a_block_is_whole_while_it_is_used():
    """Its 512 columns over eight devices are half a block each."""
    x = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    expected, _ = run(None, ("embed", "hidden"), (256, 512), x)
    found, sent = run("tensor=8", ("embed", "hidden"), (256, 512), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    assert sent == {"all-gather": 1}
