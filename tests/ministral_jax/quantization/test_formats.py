"""Weights and products of every format against float64 numpy: weights to the bit, products to 1e-5 of their range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ministral_jax.quantization import LinearFormat, QuantizedProduct, fp8
from ministral_jax.quantization import weight as weight_module
from ministral_jax.quantization.nvfp4 import nvfp4_rounded
from ministral_jax.quantization.rounding import divided, e2m1_values, to_e2m1, unpacked
from pallas_kernels.dispatch import Target
from pallas_kernels.tpu import block_product
from tests.quantized_files import CASES, E4M3, encode, nearest_e2m1, rounded_activations, unpack, values

SHAPES = ((24, 48), (160, 272))


def drawn(case, shape, seed=0):
    """The parts of a random matrix, and the weight made of them."""
    name, activations, spelling = case
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3
    parts = encode(weight, name, activations, spelling)
    stored = LinearFormat(name, activations, double=spelling == "double")
    expected = stored.parts(*shape)
    arrays = {part: jnp.asarray(parts[part].reshape(expected[part].shape)) for part in expected}
    assert {part: (array.shape, array.dtype) for part, array in arrays.items()} == {
        part: (spec.shape, jnp.dtype(spec.dtype)) for part, spec in expected.items()
    }
    return parts, stored.weight(arrays), weight


def tokens(shape, seed=1):
    """Activations with outliers, an empty row, and one that is tiny."""
    x = np.random.default_rng(seed).standard_normal((6, shape[1])).astype(np.float32)
    x[0, 3] = 40.0
    x[1] = 0.0
    x[2] *= 1e-4
    return x


def worst(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.ptp(expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_exact_to_the_bit(case, shape):
    parts, weight, dense = drawn(case, shape)
    expected = values(parts, case[0])
    found = np.asarray(jax.jit(lambda w: w.dequantize())(weight))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), expected.astype(np.float32).view(np.int32))
    assert worst(found, dense) < 0.1  # and the encoder of the test is one


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_plain_products_leave_activations_alone(case, shape):
    parts, weight, _ = drawn(case, shape)
    x = tokens(shape)
    expected = x.astype(np.float64) @ values(parts, case[0]).T
    assert worst(jax.jit(lambda w, x: w.product(x))(weight, x), expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "none"])
def test_quantised_products_round_activations_as_the_format_says(case, shape):
    parts, weight, _ = drawn(case, shape)
    assert isinstance(weight, QuantizedProduct)
    x = tokens(shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        rounded = np.nan_to_num(rounded_activations(x, case[0], parts))
    expected = rounded @ values(parts, case[0]).T
    found = jax.jit(lambda w, x: w.quantized_product(x))(weight, x)
    assert worst(found, expected) < 1e-5
    assert worst(found, x.astype(np.float64) @ values(parts, case[0]).T) > 1e-4  # rounding was worth testing
    assert not np.asarray(found)[1].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [CASES[7], CASES[9], CASES[10], CASES[11], CASES[12]])
def test_one_token_decodes_to_what_many_give(case, shape):
    _, weight, _ = drawn(case, shape)
    x = jnp.asarray(tokens(shape))
    together = np.asarray(weight.product(x), np.float64)
    assert worst(weight.product(x[:1]), together[:1]) < 1e-6
    assert worst(weight.product(x[None, None, 3]), together[None, None, 3]) < 1e-6
    if isinstance(weight, QuantizedProduct) and case[1] != "none":
        rounded = np.asarray(weight.quantized_product(x), np.float64)
        assert worst(weight.quantized_product(x[3]), rounded[3]) < 1e-6


def test_groups_gone_through_in_turn_give_what_all_at_once_give(monkeypatch):
    _, weight, _ = drawn(("fp8_block", "dynamic", "hf"), (160, 272))
    x = jnp.asarray(tokens((160, 272)).reshape(2, 3, 272))
    at_once = weight.quantized_product(x)
    monkeypatch.setattr(fp8, "MAX_PARTIAL_BYTES", 0)
    in_turn = weight.quantized_product(x)
    assert in_turn.shape == (2, 3, 160)
    assert worst(in_turn, np.asarray(at_once, np.float64)) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_come_in_the_dtype_of_the_activations(case, dtype):
    parts, weight, _ = drawn(case, (24, 48))
    x = jnp.asarray(tokens((24, 48)), dtype)
    expected = np.asarray(x, np.float64) @ values(parts, case[0]).T
    found = weight.product(x)
    assert found.dtype == x.dtype
    assert worst(found.astype(jnp.float32), expected) < 5e-3
    if isinstance(weight, QuantizedProduct) and case[1] != "none":
        assert weight.quantized_product(x).dtype == x.dtype


def test_the_published_example_of_packed_nibbles():
    packed = jnp.asarray([[0xA1, 0x87, 0x35, 0x4F]], jnp.uint8)
    np.testing.assert_array_equal(e2m1_values(unpacked(packed)), [[0.5, -1, 6, -0.0, 3, 1.5, -6, 2]])
    np.testing.assert_array_equal(unpacked(packed), unpack(np.asarray(packed)))


def test_four_bit_rounding_goes_to_the_nearest_and_ties_to_even():
    x = np.linspace(-7, 7, 8 * 7 * 16 + 1, dtype=np.float32)  # every tie is among them
    codes = nearest_e2m1(np.clip(x, -6, 6))
    np.testing.assert_array_equal(to_e2m1(jnp.asarray(x)), e2m1_values(jnp.asarray(codes)))


def test_groups_whose_scale_rounds_to_zero_are_zero():
    x = jnp.zeros((1, 48)).at[0, 16:32].set(1e-8).at[0, 32:].set(1.0)
    rounded = np.asarray(nvfp4_rounded(x, jnp.float32(400.0)))
    assert not rounded[0, :32].any()
    np.testing.assert_allclose(rounded[0, 32:] / 400, 1.0, rtol=0.05)


def test_division_by_a_constant_is_rounded_correctly():
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda x: divided(x, 127.5))(x), x / np.float32(127.5))


def test_static_activations_beyond_their_scale_are_clamped():
    weight = fp8.Fp8Weight(jnp.ones((1, 4), E4M3), jnp.float32(1.0), jnp.float32(0.5))
    np.testing.assert_array_equal(weight.quantized_product(jnp.full((1, 4), 1e6)), [[4 * 448 * 0.5]])


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("nvfp4", "nf4")])
def test_sets_of_rows_one_after_the_other_give_the_product_of_all(case, monkeypatch):
    """What a GPU does with several tokens of a large matrix, done here with a small one."""
    _, weight, _ = drawn(case, (48, 64))
    x = jnp.asarray(tokens((48, 64))).reshape(2, 3, 64)
    product = weight.product if case[1] == "none" else weight.quantized_product

    def both():
        return jax.jit(lambda x: (product(x), jax.grad(lambda x: jnp.sum(weight.product(x) ** 2))(x)))(x)

    expected, expected_gradient = both()
    sets = []

    def on_gpu(*, cuda, default):
        sets.append(cuda)
        return cuda()

    monkeypatch.setattr(weight_module, "SET_BYTES", 1000)
    monkeypatch.setattr(lax, "platform_dependent", on_gpu)
    found, gradient = both()
    assert len(sets) == 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-3)
    assert "f32[48,32]" not in str(jax.make_jaxpr(product)(x))


@pytest.mark.parametrize("rounded", [False, True])
def test_blocks_of_fp8_on_a_tpu_are_those_anywhere(rounded, monkeypatch):
    """The kernel, interpreted, and its gradient; bfloat16 holds e4m3 numbers exactly."""
    _, weight, _ = drawn(("fp8_block", "dynamic", "hf"), (256, 384))
    product = weight.quantized_product if rounded else weight.product
    x = jnp.asarray(tokens((256, 384)).reshape(2, 3, 384))
    expected, pull = jax.vjp(product, x)
    in_bfloat16 = product(x.astype(jnp.bfloat16))
    kernel = functools.partial(block_product.block_product, interpret=True)
    monkeypatch.setattr(block_product, "block_product", kernel)
    monkeypatch.setattr(fp8, "target", lambda: Target("tpu", "TPU v6 lite"))
    found, pull_of_kernel = jax.vjp(product, x)
    assert worst(found, np.asarray(expected, np.float64)) < 1e-6
    np.testing.assert_array_equal(pull_of_kernel(expected)[0], pull(expected)[0])
    again = product(x.astype(jnp.bfloat16)).astype(jnp.float32)
    assert worst(again, np.asarray(in_bfloat16, np.float64)) < 5e-3
