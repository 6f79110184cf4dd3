"""What callers may pass to the operations: checks that raise one line naming the argument. No arithmetic.

They run before anything is traced, and do not count on jaxtyping: users call the operations without its hook.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np

from .reference import FP8_BLOCK

INT32 = np.iinfo(np.int32)


def check_heads_and_window(n_query_heads: int, n_key_heads: int, window: Any) -> None:
    """Raises ValueError unless query heads divide evenly over key heads and the window is None or a positive int."""
    for name, heads in {"q": n_query_heads, "k": n_key_heads}.items():
        if heads < 1:
            raise ValueError(f"{name} has {heads} heads: expected at least 1")
    if n_query_heads % n_key_heads:
        raise ValueError(
            f"q has {n_query_heads} heads, k has {n_key_heads}: the first must be a multiple of the second"
        )
    if window is None:
        return
    if not isinstance(window, int | np.integer) or isinstance(window, bool):
        raise ValueError(f"window is {_described(window)}: expected None or an int, known before compiling")
    if window < 1:
        raise ValueError(f"window={window}: expected None or at least 1 (a token always sees itself)")


def check_flash_arrays(q: Any, k: Any, v: Any) -> None:
    """Raises ValueError unless q [B, T, N, H], k [B, S, K, H] and v [B, S, K, Hv] fit together."""
    for name, axes, array in (("q", "B, T, N, H", q), ("k", "B, S, K, H", k), ("v", "B, S, K, Hv", v)):
        shape = getattr(array, "shape", None)
        if shape is None or not hasattr(array, "dtype"):
            raise ValueError(f"{name} is a {type(array).__name__}: expected an array [{axes}]")
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {tuple(shape)}: expected four axes [{axes}]")
        if shape[3] < 1:
            raise ValueError(f"{name} has head width {shape[3]}: expected at least 1")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}: expected a floating-point dtype")
    for name, array in {"k": k, "v": v}.items():
        if array.dtype != q.dtype:
            raise ValueError(f"{name} is {array.dtype}, q is {q.dtype}: they must be equal")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}, q has {q.shape[0]}: they must be equal")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head width {k.shape[3]}, q has {q.shape[3]}: they must be equal")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has batch, length and heads {v.shape[:3]}, k has {k.shape[:3]}: they must be equal")


def check_offset_and_scale(query_offset: Any, scale: Any) -> None:
    """Raises ValueError unless the offset is a whole number of 32 bits and the scale None or a finite number."""
    if isinstance(query_offset, int | np.integer) and not isinstance(query_offset, bool):
        if not INT32.min <= query_offset <= INT32.max:
            raise ValueError(f"query_offset={query_offset}: expected a number of 32 bits")
    elif not _is_integer_array(query_offset) or getattr(query_offset, "shape", None) != ():
        raise ValueError(f"query_offset is {_described(query_offset)}: expected an int or an integer array of no axes")
    if scale is None:
        return
    if not isinstance(scale, numbers.Real | np.floating) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale is {_described(scale)}: expected None or a finite number, known before compiling")


def split_segments(segment_ids: Any, q: Any, k: Any) -> tuple[Any, Any]:
    """The ids of queries [B, T] and of keys [B, S], from one array where T equals S, or from a pair; (None, None).

    Raises ValueError for ids of other shapes or that are no integers.
    """
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, tuple) and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids is one array but q has {q.shape[1]} rows and k has {k.shape[1]}: give a pair (queries, keys)"
        )
    both = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(both) != 2:
        raise ValueError(f"segment_ids has {len(both)} parts: expected one array or a pair (queries, keys)")
    for of, ids, rows in zip(("q", "k"), both, (q, k), strict=True):
        if not _is_integer_array(ids):
            raise ValueError(f"segment_ids of {of} are {_described(ids)}: expected an integer array")
        if tuple(ids.shape) != tuple(rows.shape[:2]):
            raise ValueError(
                f"segment_ids of {of} have shape {tuple(ids.shape)}, expected batch and length {tuple(rows.shape[:2])}"
            )
    return both[0], both[1]


def check_grouped_arrays(x: Any, w: Any, group_sizes: Any) -> None:
    """Raises ValueError unless x [M, I], w [E, O, I] and group_sizes [E] fit together."""
    for name, axes, array in (("x", "M, I", x), ("w", "E, O, I", w), ("group_sizes", "E", group_sizes)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise ValueError(f"{name} is a {type(array).__name__}: expected an array [{axes}]")
        if len(array.shape) != len(axes.split(",")):
            raise ValueError(f"{name} has shape {tuple(array.shape)}: expected [{axes}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: expected a floating-point dtype")
    if w.dtype != x.dtype:
        raise ValueError(f"w is {w.dtype}, x is {x.dtype}: they must be equal")
    if w.shape[2] != x.shape[1]:
        raise ValueError(f"w has {w.shape[2]} inputs, x has {x.shape[1]}: they must be equal")
    if not _is_integer_array(group_sizes) or group_sizes.shape[0] != w.shape[0]:
        raise ValueError(
            f"group_sizes is {_described(group_sizes)}: expected integers, one for each of {len(w)} groups"
        )


def check_block_scales(x_scale: Any, w_scale: Any, x: Any, w: Any) -> None:
    """Raises ValueError unless x_scale [M, I / 128] and w_scale [E, O / 128, I / 128] are of x [M, I], w [E, O, I]."""
    n_blocks = x.shape[1] // FP8_BLOCK
    for name, array, expected in (
        ("x_scale", x_scale, (x.shape[0], n_blocks)),
        ("w_scale", w_scale, (w.shape[0], w.shape[1] // FP8_BLOCK, n_blocks)),
    ):
        if getattr(array, "shape", None) != expected or getattr(array, "dtype", None) != jnp.float32:
            raise ValueError(f"{name} is {_described(array)}: expected float32 {list(expected)}")


def _is_integer_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.integer)


def _described(value: Any) -> str:
    """Numbers, texts and None as they print, arrays by dtype and shape, anything else by its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value) if value is None or isinstance(value, numbers.Number | str) else f"a {type(value).__name__}"
