"""Encoders against the numpy encoders of the tests: the same bytes, and an error of the size that each format has."""

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.quantization import LinearFormat
from ministral_jax.quantization.encoding import encode, relative_error
from tests.quantized_files import CASES, pack
from tests.quantized_files import encode as reference

FORMATS = sorted({(name, spelling == "double") for name, _, spelling in CASES})
# Relative errors of normal weights; int8 and four-bit ones are known from the literature, the rest from the step size.
LARGEST_ERROR = {"int8_channel": 0.01, "nvfp4": 0.11, "nf4": 0.105}


def drawn(shape=(160, 272), seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.3
    weight[5, 17] = 4.0  # an outlier
    return weight


@pytest.mark.parametrize(("name", "double"), FORMATS)
def test_encoders_agree_with_independent_ones_to_the_bit(name, double):
    weight = drawn()
    found = encode(jnp.asarray(weight), LinearFormat(name, double=double))
    expected = reference(weight, name, spelling="double" if double else "compressed")
    assert sorted(found) == sorted(expected)
    for part, array in found.items():
        other = expected[part].reshape(array.shape)
        assert array.dtype == other.dtype, part
        if part == "weight_absmax_offset" or (double and part != "weight_packed"):
            np.testing.assert_allclose(array.astype(np.float32), other.astype(np.float32), rtol=1e-2, atol=1)
        elif double:
            assert (np.asarray(array) == other).mean() > 0.99  # a mean is summed in another order
        else:
            assert np.asarray(array).tobytes() == other.tobytes(), part


@pytest.mark.parametrize(("name", "double"), FORMATS)
def test_the_error_is_that_of_the_format(name, double):
    stored = LinearFormat(name, double=double)
    weight = jnp.asarray(drawn())
    error = relative_error(weight, encode(weight, stored), stored)
    dense = np.asarray(stored.weight(encode(weight, stored)).dequantize(), np.float64)
    assert error == pytest.approx(np.linalg.norm(dense - weight) / np.linalg.norm(weight), rel=1e-4)
    assert 1e-3 < error < LARGEST_ERROR.get(name, 0.03)


@pytest.mark.parametrize(("name", "double"), FORMATS)
def test_a_matrix_of_zeros_stays_one(name, double):
    stored = LinearFormat(name, double=double)
    parts = encode(jnp.zeros((4, 64)), stored)
    assert not np.asarray(stored.weight(parts).dequantize()).any()


def test_static_scales_follow_from_the_largest_input():
    weight = jnp.asarray(drawn((16, 32)))
    fp8 = encode(weight, LinearFormat("fp8_tensor", "static"), 44.8)
    assert float(fp8["input_scale"]) == pytest.approx(0.1)
    nvfp4 = encode(weight, LinearFormat("nvfp4", "dynamic"), 26.88)
    assert float(nvfp4["input_global_scale"]) == pytest.approx(100.0)


def test_pack_of_the_tests_is_the_published_order():
    np.testing.assert_array_equal(pack(np.array([[1, 10, 7, 8, 5, 3, 15, 4]])), [[0xA1, 0x87, 0x35, 0x4F]])
