"""Bad arguments of flash_attention: one line that names the argument, before anything is traced, without jaxtyping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import flash_attention
from pallas_kernels.arguments import split_segments

# The tests' hook checks shapes before the function is entered; users run without it.
unchecked = getattr(flash_attention, "__wrapped__", flash_attention)


def call(**changes: Any) -> Any:
    """A call that is right but for what is changed."""
    good: dict[str, Any] = {"q": jnp.ones((2, 6, 4, 8)), "k": jnp.ones((2, 6, 2, 8)), "v": jnp.ones((2, 6, 2, 8))}
    arguments = {**good, **changes}
    return unchecked(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def ones(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)  # has no values: whatever computes with it fails otherwise


IDS = jnp.zeros((2, 6), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": ones(3, 6, 2, 8), "v": ones(3, 6, 2, 8)}, "k has batch 3, q has 2: they must be equal"),
        ({"v": ones(2, 5, 2, 8)}, r"v has batch, length and heads \(2, 5, 2\), k has \(2, 6, 2\)"),
        ({"k": ones(2, 6, 2, 4)}, "k has head width 4, q has 8"),
        ({"k": ones(2, 6, 3, 8), "v": ones(2, 6, 3, 8)}, "q has 4 heads, k has 3: the first must be a multiple"),
        ({"k": ones(2, 6, 0, 8), "v": ones(2, 6, 0, 8)}, "k has 0 heads: expected at least 1"),
        ({"q": ones(6, 4, 8)}, r"q has shape \(6, 4, 8\): expected four axes \[B, T, N, H\]"),
        ({"v": ones(2, 6, 2, 0)}, "v has head width 0"),
        ({"q": [1.0]}, "q is a list: expected an array"),
        ({"q": ones(2, 6, 4, 8, dtype=jnp.int32)}, "q is int32: expected a floating-point dtype"),
        ({"k": ones(2, 6, 2, 8, dtype=jnp.bfloat16)}, "k is bfloat16, q is float32: they must be equal"),
        ({"v": ones(2, 6, 2, 8, dtype=jnp.bfloat16)}, "v is bfloat16, q is float32: they must be equal"),
        ({"window": 0}, "window=0: expected None or at least 1"),
        ({"window": 3.0}, "window is 3.0: expected None or an int"),
        ({"window": True}, "window is True: expected None or an int"),
        ({"window": jnp.int32(3)}, r"window is int32\[\]: expected None or an int, known before compiling"),
        ({"segment_ids": jnp.zeros((2, 7), jnp.int32)}, r"segment_ids of q have shape \(2, 7\), expected .* \(2, 6\)"),
        ({"segment_ids": (IDS, jnp.zeros((2, 9), jnp.int32))}, r"segment_ids of k have shape \(2, 9\)"),
        ({"segment_ids": (IDS, IDS, IDS)}, "segment_ids has 3 parts: expected one array or a pair"),
        ({"segment_ids": jnp.zeros((2, 6))}, r"segment_ids of q are float32\[2, 6\]: expected an integer array"),
        ({"segment_ids": [[0] * 6] * 2}, "segment_ids of q are a list: expected an integer array"),
        ({"segment_ids": IDS, "q": ones(2, 5, 4, 8)}, "q has 5 rows and k has 6: give a pair"),
        ({"query_offset": 1.5}, "query_offset is 1.5: expected an int or an integer array of no axes"),
        ({"query_offset": None}, "query_offset is None"),
        ({"query_offset": jnp.zeros(2, jnp.int32)}, r"query_offset is int32\[2\]"),
        ({"query_offset": 2**40}, "query_offset=1099511627776: expected a number of 32 bits"),
        ({"scale": float("nan")}, "scale is nan: expected None or a finite number"),
        ({"scale": jnp.float32(1)}, r"scale is float32\[\]: expected None or a finite number, known before compiling"),
        ({"implementation": "triton"}, "implementation='triton': expected one of auto, reference, xla"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": np.int64(3), "query_offset": np.int32(0), "scale": np.float32(0.5)},
        {"query_offset": jnp.int32(2), "scale": 1},
        {"segment_ids": (np.zeros((2, 6), np.uint8), np.zeros((2, 6), np.int32))},
    ],
)
def test_numbers_and_ids_of_numpy_are_as_good_as_any(changes: dict[str, Any]) -> None:
    assert call(**changes).shape == (2, 6, 4, 8)


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@given(queries=SHAPES, keys=SHAPES)
def test_a_pair_of_ids_is_taken_exactly_when_both_shapes_fit(queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    q, k = ones(2, 3, 4, 8), ones(2, 1, 4, 8)
    pair = ones(*queries, dtype=jnp.int32), ones(*keys, dtype=jnp.int32)
    if (queries, keys) == ((2, 3), (2, 1)):
        assert split_segments(pair, q, k) == pair
        return
    with pytest.raises(ValueError, match=r"segment_ids of [qk] have shape"):
        split_segments(pair, q, k)


def test_arguments_are_checked_where_jaxtyping_is_not_active() -> None:
    program = (
        "import jax.numpy as jnp; from pallas_kernels import flash_attention\n"
        "q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((3, 6, 2, 8))\n"
        "try: flash_attention(q, k, k)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout == "k has batch 3, q has 2: they must be equal\n", done.stderr
