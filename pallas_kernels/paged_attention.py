"""paged_attention: ragged queries of many sequences against a paged cache, and the write that fills its pages.

Checks and dispatch only.
"""

from __future__ import annotations

import typing
from typing import Any, Literal, overload

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from .arguments import check_heads_and_window
from .dispatch import choose, target
from .paged_dispatch import TABLE, Implementation, PagedProblem
from .reference import token_positions

__all__ = ["Implementation", "paged_attention", "token_slots", "write_pages"]

POOL_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")


@overload
def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    value_width: int | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "T N value"]: ...


@overload
def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    value_width: int | None = None,
    return_lse: Literal[True],
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> tuple[Float[Array, "T N value"], Float[Array, "T N"]]: ...


def paged_attention(
    q: Float[Array, "T N H"],
    k_pages: Num[Array, "P page K H"],
    v_pages: Num[Array, "P page K Hv"] | None,
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    k_scale: Float[Array, "K"] | None = None,
    v_scale: Float[Array, "K"] | None = None,
    value_width: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    interpret: Any = False,
) -> Float[Array, "T N value"] | tuple[Float[Array, "T N value"], Float[Array, "T N"]]:
    """Causal grouped-query attention of packed queries over keys and values kept in pages.

    Sequence b owns query rows `query_starts[b] .. query_starts[b+1]-1`, the last of its `lengths[b]` tokens, whose keys
    are already written: row i of n stands at position `lengths[b] - n + i`. Its key at position p lies in page
    `page_table[b, p // page]` at place `p % page`. Rows past `query_starts[-1]` are padding and give zeros.

    Page 0 is the null page. Entries of pages that the window has left may be 0, and whatever stands there, behind the
    window, or past `lengths`, NaN included, never reaches the result.

    Pools may be 8 bits wide (int8, float8_e4m3fn): a key of head k is then `k_pages * k_scale[k]`, a value
    `v_pages * v_scale[k]`. With `v_pages=None` the values are the first `value_width` columns of the keys, which is
    latent attention in its absorbed form (K = 1, H = latent + rotated part, value_width = latent).

    Args:
      q: packed queries, rotated already.
      k_pages, v_pages: pools of pages; Hv may differ from H.
      page_table: page of each run of `page` positions, by absolute page number.
      query_starts: first query row of each sequence, and the end of the last.
      lengths: tokens of each sequence, this call's included.
      window: keys a query sees, itself included; None for all before it.
      scale: multiplies the scores; None means `H ** -0.5`.
      k_scale, v_scale: what pool entries of each key head are multiplied by; None for 1. Without `v_pages`, the values
        are keys and take `k_scale`.
      value_width: given exactly where `v_pages` is None.
      return_lse: also return the log-sum-exp [T, N], float32, -inf for rows that see nothing; partial results merge by
        it.
      implementation: "auto" picks by device, dtype and shape (the table in paged_dispatch.py) and logs once what it
        passed over; "reference" (dense), "xla" (visible pages only), "pallas_tpu", "pallas_gpu" by name.
      interpret: True, or the parameters of the platform's own interpreter, runs a Pallas kernel step by step on CPU.

    Returns the mixed values [T, N, Hv or value_width] in the dtype of q, and the log-sum-exp if asked for.

    Raises ValueError, before anything is traced further, for arguments that do not fit together.
    """
    _check_shapes(q, k_pages, v_pages, page_table, query_starts, lengths)
    _check_scales(k_pages, v_pages, k_scale, v_scale)
    Hv = _value_width(k_pages, v_pages, value_width)
    check_heads_and_window(q.shape[1], k_pages.shape[2], window)
    names = typing.get_args(Implementation)
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(names)}")
    problem = _problem(q, k_pages, page_table, Hv, latent=v_pages is None, interpret=bool(interpret))
    run = choose("paged_attention", TABLE, implementation, problem)
    out, lse = run(
        q,
        k_pages,
        v_pages,
        page_table,
        query_starts,
        lengths,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        k_scale=k_scale,
        v_scale=v_scale,
        **({"value_width": Hv} if v_pages is None else {}),
        **({"interpret": interpret} if interpret else {}),
    )
    return (out, lse) if return_lse else out


def _problem(
    q: Array, k_pages: Array, page_table: Array, value_width: int, *, latent: bool, interpret: bool
) -> PagedProblem:
    return PagedProblem(
        target=target(),
        dtype=str(q.dtype),
        pool_dtype=str(k_pages.dtype),
        widths=(q.shape[-1], value_width),
        heads=(q.shape[1], k_pages.shape[2]),
        page=k_pages.shape[1],
        rows=q.shape[0],
        sequences=page_table.shape[0],
        table_width=page_table.shape[1],
        latent=latent,
        interpret=interpret,
    )


def token_slots(
    page_table: Int[Array, "B pages"],
    query_starts: Int[Array, "B_plus_1"],
    lengths: Int[Array, "B"],
    n_tokens: int,
    page_size: int,
    n_pages: int,
) -> Int[Array, "T"]:
    """Where each packed row's key and value go, as an index into the flattened pool [P * page].

    Padding rows, positions past the page table, and null pages give `P * page`, one past the end, which `write_pages`
    drops.
    """
    sequence, position = token_positions(query_starts, lengths, n_tokens)
    page = page_table.at[jnp.clip(sequence, 0), jnp.clip(position, 0) // page_size].get(mode="fill", fill_value=0)
    writable = (position >= 0) & (page > 0) & (page < n_pages)
    return jnp.where(writable, page * page_size + position % page_size, n_pages * page_size)


def write_pages(
    pages: Num[Array, "P page K H"],
    new: Float[Array, "T K H"],
    slots: Int[Array, "T"],
    scale: Float[Array, "K"] | None = None,
) -> Num[Array, "P page K H"]:
    """The pool with `new` written at `slots` (see `token_slots`): one scatter, in place where the pool is donated.

    A slot past the end is dropped, never clipped. What is stored is `new / scale` of each key head in the dtype of the
    pool: rounded to nearest even, and held to the largest numbers of an 8-bit type.
    """
    entries = new if scale is None else new / scale[:, None].astype(new.dtype)
    if pages.dtype == jnp.int8:
        entries = jnp.clip(jnp.round(entries), -127, 127)
    elif pages.dtype == jnp.float8_e4m3fn:
        top = float(jnp.finfo(jnp.float8_e4m3fn).max)
        entries = jnp.clip(entries, -top, top)
    flat = pages.reshape(-1, *pages.shape[2:])
    return flat.at[slots].set(entries.astype(pages.dtype), mode="drop").reshape(pages.shape)


def _check_shapes(
    q: Array, k_pages: Array, v_pages: Array | None, page_table: Array, query_starts: Array, lengths: Array
) -> None:
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}: expected a floating-point dtype")
    if k_pages.shape[-1] != q.shape[-1]:
        raise ValueError(f"k_pages has head width {k_pages.shape[-1]}, q has {q.shape[-1]}: they must be equal")
    if v_pages is not None and v_pages.shape[:3] != k_pages.shape[:3]:
        raise ValueError(
            f"v_pages is {v_pages.shape[:3]} and k_pages {k_pages.shape[:3]} in pages, size and heads: "
            "they must be equal"
        )
    if query_starts.shape[0] != page_table.shape[0] + 1:
        raise ValueError(
            f"query_starts has {query_starts.shape[0]} entries, expected {page_table.shape[0] + 1}: "
            "one more than the page table has sequences"
        )
    if lengths.shape[0] != page_table.shape[0]:
        raise ValueError(f"lengths has {lengths.shape[0]} entries, the page table {page_table.shape[0]} sequences")
    for name, array in {"page_table": page_table, "query_starts": query_starts, "lengths": lengths}.items():
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}: expected int32")


def _value_width(k_pages: Array, v_pages: Array | None, value_width: int | None) -> int:
    if v_pages is None:
        if value_width is None or not 0 < value_width <= k_pages.shape[-1]:
            raise ValueError(
                f"value_width={value_width} without v_pages: expected 1 to {k_pages.shape[-1]}, columns of the keys"
            )
        return value_width
    if value_width is not None:
        raise ValueError(f"value_width={value_width} with v_pages: expected None, their width is their own")
    return v_pages.shape[-1]


def _check_scales(k_pages: Array, v_pages: Array | None, k_scale: Array | None, v_scale: Array | None) -> None:
    if v_pages is None and v_scale is not None:
        raise ValueError("v_scale is given without v_pages: the values are keys and take k_scale")
    if v_pages is not None and v_pages.dtype != k_pages.dtype:
        raise ValueError(f"v_pages is {v_pages.dtype}, k_pages is {k_pages.dtype}: they must be equal")
    for name, pool, scale in (("k", k_pages, k_scale), ("v", v_pages, v_scale)):
        if pool is not None and str(pool.dtype) not in POOL_DTYPES:
            raise ValueError(f"{name}_pages is {pool.dtype}: expected one of {', '.join(POOL_DTYPES)}")
        if scale is not None and scale.shape != k_pages.shape[2:3]:
            raise ValueError(f"{name}_scale is {scale.shape}, expected one number per key head {k_pages.shape[2:3]}")
