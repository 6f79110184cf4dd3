"""How the Hopper kernel of paged_attention cuts up its work: splits, tiles, memory, refusals. No kernel is run."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gpu.paged import PAGES, WIDEST_NARROW, WIDTHS, paged_attention_gpu, unsupported
from pallas_kernels.gpu.paged_plan import MULTIPROCESSORS, Sizes, plan_for, split_count
from pallas_kernels.gpu.tiles import SHARED_MEMORY_LIMIT


@pytest.mark.parametrize("tiles", [1, 8, 24, 64, 100, 106, 512, 4096])
def test_keys_are_split_only_where_tiles_leave_the_chip_empty(tiles: int) -> None:
    splits = split_count(tiles, blocks=4096)
    if tiles >= 0.8 * MULTIPROCESSORS:
        assert splits == 1
    else:
        waves = -(-tiles * splits // MULTIPROCESSORS)
        assert tiles * splits >= 0.8 * waves * MULTIPROCESSORS


def test_there_are_never_more_splits_than_blocks() -> None:
    assert split_count(8, blocks=3) <= 3
    assert split_count(8, blocks=0) == 1


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (64, 64), (256, 64), (2048, 4), (2048, 64), (1, 7)])
@pytest.mark.parametrize("pool_bytes", [1, 2])
def test_every_plan_fits_shared_memory_and_its_rows(tokens: int, sequences: int, pool_bytes: int) -> None:
    for width, value_width, window in itertools.product(WIDTHS, WIDTHS, (None, 4096)):
        if pool_bytes == 1 and max(width, value_width) > WIDEST_NARROW:
            continue
        for heads, kv_heads in ((32, 8), (40, 8), (64, 1), (8, 8)):
            sizes = Sizes(tokens, sequences, heads, kv_heads, width, value_width, 262_144, pool_bytes)
            plan = plan_for(sizes, window)
            assert plan.bytes_needed(width, value_width, pool_bytes) <= SHARED_MEMORY_LIMIT
            assert plan.tokens * plan.group <= plan.rows <= 64 * plan.consumers // plan.rings
            assert plan.rows % 8 == 0
            assert plan.splits % plan.rings == 0
            assert all(plan.block % page == 0 or page % plan.block == 0 for page in PAGES)


GOOD: dict[str, Any] = {"dtypes": ("bfloat16",) * 3, "widths": (128, 128), "heads": (32, 8), "page": 16}


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11")
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"dtypes": ("bfloat16", "int8", "int8")}, None),
        ({"dtypes": ("bfloat16", "float8_e4m3fn", "float8_e4m3fn")}, None),
        ({"dtypes": ("float32",) * 3}, "q is float32"),
        ({"dtypes": ("bfloat16", "float8_e5m2", "float8_e5m2")}, "pages are float8_e5m2 and float8_e5m2"),
        ({"dtypes": ("bfloat16", "bfloat16", "int8")}, "pages are bfloat16 and int8"),
        ({"dtypes": ("float16", "int8", "int8")}, "for float16 queries"),
        ({"dtypes": ("bfloat16", "int8", "int8"), "widths": (256, 256)}, "8-bit pages"),
        ({"widths": (80, 80)}, r"head widths \(keys, values\) are \(80, 80\)"),
        ({"page": 24}, "pages have 24 tokens"),
        ({"heads": (128, 1)}, "128 query heads share 1 key heads"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_one_line(changed: dict[str, Any], reason: str | None) -> None:
    import re

    found = unsupported(**(GOOD | changed))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found)
        assert "\n" not in found


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has what the kernel needs")
def test_an_older_jax_is_named() -> None:
    assert unsupported(**GOOD) == f"the Hopper kernels need jax >= 0.11, found {jax.__version__}"


def test_a_refused_call_raises_the_reason() -> None:
    pool, ints = jnp.zeros((2, 16, 1, 64)), jnp.zeros(1, jnp.int32)
    starts = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="implementation='pallas_gpu': "):
        paged_attention_gpu(jnp.zeros((1, 1, 64)), pool, pool, ints[None], starts, ints, window=None, scale=1.0)
