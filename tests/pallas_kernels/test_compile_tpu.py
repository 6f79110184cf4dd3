"""The TPU kernels compiled to machine code for chips that are not here. Nothing is run."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

# Static counts (benchmarks/LOG.md): the same on every machine for one version of libtpu.
LEAST_MXU_SHARE = {"forward": 0.60, "dq": 0.74, "dkv": 0.80}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: lengths, heads, widths, and what else decides which code is compiled."""

    T: int = 8192
    S: int = 8192
    N: int = 32
    K: int = 8
    H: int = 128
    Hv: int = 128
    window: int | None = 1024
    dtype: Any = jnp.bfloat16
    segmented: bool = False
    traced_offset: bool = False


def gradients(shape: Shape) -> Any:
    """A function with all three kernels in it, and the shapes of its arguments."""
    from pallas_kernels.tpu.flash import flash_attention_tpu

    def loss(q: Any, k: Any, v: Any, query_ids: Any, key_ids: Any, offset: Any) -> Any:
        out, lse = flash_attention_tpu(
            q,
            k,
            v,
            window=shape.window,
            query_segments=query_ids if shape.segmented else None,
            key_segments=key_ids if shape.segmented else None,
            query_offset=offset if shape.traced_offset else shape.S - shape.T,
            scale=shape.H**-0.5,
        )
        return out.astype(jnp.float32).sum() + lse.sum()

    struct = jax.ShapeDtypeStruct
    arguments = (
        struct((1, shape.T, shape.N, shape.H), shape.dtype),
        struct((1, shape.S, shape.K, shape.H), shape.dtype),
        struct((1, shape.S, shape.K, shape.Hv), shape.dtype),
        struct((1, shape.T), jnp.int32),
        struct((1, shape.S), jnp.int32),
        struct((), jnp.int32),
    )
    return jax.value_and_grad(loss, argnums=(0, 1, 2)), arguments


@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        ("v5e", Shape(window=4096)),
        ("v6e", Shape(window=1024)),
        ("tpu7x", Shape(window=None)),
        ("v6e", Shape(T=2000, S=2600, N=8, K=2, H=64, Hv=64, segmented=True, traced_offset=True)),
        ("v6e", Shape(T=2048, S=2048, N=4, K=4, H=96, Hv=96, window=None)),
        ("v6e", Shape(T=2048, S=2048, N=4, K=4, H=192, Hv=128, window=None)),
        ("v6e", Shape(T=2048, S=2048, N=16, K=1, H=256, Hv=256)),
        ("v6e", Shape(T=2048, S=2048, N=4, K=2, dtype=jnp.float32, segmented=True)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.T}x{x.S}-{x.N}-{x.K}-{x.H}-{x.Hv}-{x.window}-{x.dtype.__name__}",
)
def test_all_three_kernels_compile_and_hold_no_scores(chip: Any, shape: Shape) -> None:
    from pallas_kernels.tpu.ahead_of_time import compile_for

    function, arguments = gradients(shape)
    compiled = compile_for(chip, function, *arguments)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 6 * memory.argument_size_in_bytes
    text = compiled.as_text() or ""
    for kernel in ("forward", "dq", "dkv"):
        assert f"flash_attention_{kernel}" in text
    cost = compiled.cost_analysis()
    assert cost is not None
    assert cost["flops"] > 0


@pytest.mark.parametrize("kernel", LEAST_MXU_SHARE)
def test_the_kernels_keep_the_matrix_unit_of_a_v6e_busy(kernel: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "tpu_block_sizes.py"
    spec = importlib.util.spec_from_file_location("tpu_block_sizes", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure("v6e", kernel, 1024, benchmark.table_sizes("v6e", kernel))
    assert found["mxu"] >= LEAST_MXU_SHARE[kernel], found


@dataclasses.dataclass(frozen=True)
class Paged:
    """One call of paged_attention: 32 query heads, width 128, sequences of up to 256k tokens."""

    T: int
    page: int
    window: int | None
    pool: Any = jnp.bfloat16
    K: int = 8
    B: int = 64
    dtype: Any = jnp.bfloat16


@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        ("v5e", Paged(64, 16, 4096)),
        ("v6e", Paged(64, 128, None, pool=jnp.int8)),
        ("tpu7x", Paged(64, 16, None, pool=jnp.float8_e4m3fn)),
        ("v6e", Paged(64, 16, 4096, K=1)),
        ("v6e", Paged(256, 16, None, K=4, dtype=jnp.float32, pool=jnp.float32)),
        ("v6e", Paged(2048, 16, 4096)),
        ("v5e", Paged(2048, 128, None, pool=jnp.int8)),
        ("tpu7x", Paged(512, 128, 4096, pool=jnp.float8_e4m3fn, B=1)),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.T}-{x.page}-{x.window}-{x.K}-{x.pool.__name__}",
)
def test_paged_kernels_compile_for_long_page_tables_and_copy_no_pool(chip: Any, shape: Paged) -> None:
    from pallas_kernels.tpu.ahead_of_time import compile_for
    from pallas_kernels.tpu.paged import paged_attention_tpu

    def attend(q: Any, keys: Any, values: Any, table: Any, starts: Any, lengths: Any, scale: Any) -> Any:
        scales = {"k_scale": scale, "v_scale": scale} if jnp.dtype(shape.pool).itemsize == 1 else dict.fromkeys(SCALES)
        return paged_attention_tpu(
            q, keys, values, table, starts, lengths, window=shape.window, scale=128**-0.5, **scales
        )

    struct, width = jax.ShapeDtypeStruct, (256 << 10) // shape.page
    pool = struct(((1 << 19) // shape.page, shape.page, shape.K, 128), shape.pool)
    integers = [struct(n, jnp.int32) for n in ((shape.B, width), (shape.B + 1,), (shape.B,))]
    q = struct((shape.T, 32, 128), shape.dtype)
    compiled = compile_for(chip, attend, q, pool, pool, *integers, struct((shape.K,), jnp.float32))
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    assert memory.temp_size_in_bytes < 8 << 20
    assert ("paged_attention_rows" in text) == (shape.B > 1)
    assert ("paged_attention_lanes" in text) == (shape.T > 8 * shape.B or shape.B == 1)


SCALES = ("k_scale", "v_scale")
