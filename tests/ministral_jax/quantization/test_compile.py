"""Products with quantised weights compiled for chips that are not here: none writes the dense matrix to memory."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from ministral_jax.quantization import LinearFormat, QuantizedProduct

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compilers are not installed"),
]

SHAPE = (4096, 4096)
STORED = [
    LinearFormat("int8_channel", "dynamic"),
    LinearFormat("fp8_tensor", "static"),
    LinearFormat("fp8_block", "dynamic"),
    LinearFormat("fp8_block"),
    LinearFormat("nvfp4"),
    LinearFormat("nf4"),
]


@pytest.mark.parametrize("chip", ["v6e", "h200"])
@pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.format}-{stored.activations}")
def test_decoding_one_token_writes_no_dense_matrix(stored, chip):
    parts = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in stored.parts(*SHAPE).items()}
    x = jax.ShapeDtypeStruct((1, SHAPE[1]), jnp.bfloat16)

    def product(parts, x):
        weight = stored.weight(parts)
        quantized = isinstance(weight, QuantizedProduct) and stored.activations != "none"
        return weight.quantized_product(x) if quantized else weight.product(x)

    if chip == "v6e":
        from pallas_kernels.tpu.ahead_of_time import compile_for

        compiled = compile_for("v6e", product, parts, x)
    else:
        from pallas_kernels.gpu.ahead_of_time import compile_for_h200

        compiled = compile_for_h200(product, parts, x)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < SHAPE[0] * SHAPE[1] / 8  # a sixteenth of the matrix in bfloat16


@pytest.mark.parametrize("stored", [LinearFormat("nvfp4"), LinearFormat("nf4")], ids=lambda stored: stored.format)
def test_several_tokens_write_no_dense_matrix_on_a_gpu(stored):
    from pallas_kernels.gpu.ahead_of_time import compile_for_h200

    shape = (14336, 4096)
    parts = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in stored.parts(*shape).items()}
    x = jax.ShapeDtypeStruct((16, shape[1]), jnp.bfloat16)
    memory = compile_for_h200(lambda parts, x: stored.weight(parts).product(x), parts, x).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * shape[0] * shape[1] / 4  # all of it would be 117 MB
