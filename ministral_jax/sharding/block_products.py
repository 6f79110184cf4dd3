"""Products with quantised matrices that are split over devices: each with the rows or columns that it has.

For formats that scale blocks of a matrix, whose product goes through it block by block. Left to itself, XLA gathers the
matrix for each of them: 123 GB a decode step in five layers of Large 3, as compiled for 64 chips.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import lax
from jaxtyping import Array, Float

from ..quantization import LinearFormat
from .collectives import STORED_APART
from .layout import Layout, token_axes


def goes_by_blocks(stored: LinearFormat) -> bool:
    """Whether products of a format are for `product_by_blocks`: rows and columns share scales."""
    return min(stored.block) > 1


def product_by_blocks(
    stored: LinearFormat,
    parts: Mapping[str, Array],
    x: Float[Array, "*T I"],
    shape: tuple[int, int],
    axes: tuple[str, str],
    layout: Layout,
) -> Float[Array, "*T O"]:
    """`stored.product(parts, x)` for a matrix of this shape whose dimensions have these logical axes. Inside jit.

    Where columns are split each device has a part of every sum, and the parts are added: one all-reduce. A dimension
    that would be split within a block is whole on every device.
    """
    rows, columns = (
        axis if axis not in STORED_APART and size % (layout.ways(axis) * block) == 0 else None
        for axis, size, block in zip(axes, shape, stored.block, strict=True)
    )
    tokens = token_axes(x.shape[:-1], layout)
    added = layout.along(columns) if columns else ()

    def local(parts: Mapping[str, Array], x: Array) -> Array:
        product = stored.product(parts, x)
        return lax.psum(product, added) if added else product

    of_parts = stored.parts(*shape)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(
            {name: layout.spec([(rows, columns)[axis] for axis in part.axes]) for name, part in of_parts.items()},
            layout.spec((*tokens, columns)),
        ),
        out_specs=layout.spec((*tokens, rows)),
        check_vma=False,
    )(parts, x)
