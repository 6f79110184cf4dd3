"""The permutation between the two orders of rotary rows, on numpy or jax arrays. Imports neither, and knows no names.

Mistral-layout files pair adjacent rows of queries and keys; transformers and memory pair row i with row i + H/2.
"""

from __future__ import annotations

from typing import Any, TypeVar

AnyArray = TypeVar("AnyArray", bound=Any)  # of numpy or jax, which is not imported for this


def half_split_rows(rows: AnyArray, n_heads: int) -> AnyArray:
    """Rows of q or k from mistral order (pairs adjacent) to memory order: row `2j + c` of a head becomes `c * H/2 + j`.

    Applies along the first axis to anything that has one entry per output row: weights, LoRA B, scales.
    """
    heads = rows.reshape(n_heads, -1, 2, *rows.shape[1:])  # [heads, H/2, 2, ...]
    return heads.swapaxes(1, 2).reshape(rows.shape)


def interleaved_rows(rows: AnyArray, n_heads: int) -> AnyArray:
    """The inverse of `half_split_rows`: memory order back to mistral order."""
    heads = rows.reshape(n_heads, 2, -1, *rows.shape[1:])  # [heads, 2, H/2, ...]
    return heads.swapaxes(1, 2).reshape(rows.shape)
