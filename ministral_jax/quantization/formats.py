"""What a quantised projection keeps: its arrays by name with shapes, axes and dtypes, and how they become one weight.

Names are those of compressed-tensors. Which tensors of a file these are is for checkpoints/quantized.py to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..config import QuantizationFormat
from ..parameters import ParameterSpec
from . import nf4, nvfp4
from .fp8 import BLOCK, Fp8BlockWeight, Fp8Weight, blocks
from .int8 import Int8Weight
from .nf4 import Nf4Weight
from .nvfp4 import Nvfp4Weight
from .rounding import FP8
from .weight import QuantizedProduct, QuantizedWeight, frozen_product

LATENT_PROJECTIONS = ("wq_a", "wq_b", "wkv_a_with_mqa", "wkv_b", "wo")
# What stays dense of latent attention: in FP8 blocks as in Large 3, whose first projections are no multiple of a block;
# with one scale nothing and with NVFP4 all, as in Small 4.
_FIRST = ("wq_a", "wkv_a_with_mqa")
DENSE_LATENT: Mapping[QuantizationFormat, tuple[str, ...]] = {
    "int8_channel": _FIRST,
    "fp8_tensor": (),
    "fp8_channel": _FIRST,
    "fp8_block": _FIRST,
    "nvfp4": LATENT_PROJECTIONS,
    "nf4": _FIRST,
}

ROWS_AND_COLUMNS, ROWS, NOTHING = (0, 1), (0,), ()


@dataclass(frozen=True)
class Part:
    """One array of a quantised projection; `axes` are the axes of the matrix that its own go along."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[int, ...]


@dataclass(frozen=True)
class LinearFormat:
    """How one projection is stored and whether its activations are rounded: statically, dynamically, or not ("none").

    With `double`, the constants of nf4 are int8.
    """

    format: QuantizationFormat
    activations: str = "none"
    double: bool = False

    def parts(self, n_out: int, n_in: int) -> dict[str, Part]:
        """Name -> array, the payload first."""
        return _PARTS[self.format](self, n_out, n_in)

    def specs(self, n_out: int, n_in: int, axes: tuple[str, str]) -> dict[str, ParameterSpec]:
        """Name -> parameter, with the logical axes of each."""
        return {
            name: ParameterSpec(part.shape, tuple(axes[axis] for axis in part.axes), part.dtype, "stored")
            for name, part in self.parts(n_out, n_in).items()
        }

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a matrix that have a scale together, so that nothing can be cut within them."""
        return _BLOCKS.get(self.format, (1, 1))

    def product(self, parts: Mapping[str, Array], x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` of the matrix made of these arrays, activations rounded or not as the format says."""
        weight = self.weight(parts)
        rounded = self.activations != "none" and isinstance(weight, QuantizedProduct)
        return frozen_product(weight, x, rounded=rounded)

    def weight(self, parts: Mapping[str, Array]) -> QuantizedWeight:
        """The weight made of these arrays."""
        if self.format == "int8_channel":
            return Int8Weight(parts["weight"], parts["weight_scale"])
        if self.format in ("fp8_tensor", "fp8_channel"):
            return Fp8Weight(parts["weight"], parts["weight_scale"], parts.get("input_scale"))
        if self.format == "fp8_block":
            return Fp8BlockWeight(parts["weight"], parts["weight_scale"])
        if self.format == "nvfp4":
            return Nvfp4Weight(
                parts["weight_packed"],
                parts["weight_scale"],
                parts["weight_global_scale"],
                parts.get("input_global_scale"),
            )
        constants = (parts.get("weight_absmax_scale"), parts.get("weight_absmax_offset"))
        return Nf4Weight(parts["weight_packed"], parts["weight_absmax"], *constants)


def _int8(_: LinearFormat, n_out: int, n_in: int) -> dict[str, Part]:
    return {
        "weight": Part((n_out, n_in), jnp.int8, ROWS_AND_COLUMNS),
        "weight_scale": Part((n_out,), jnp.float32, ROWS),
    }


def _fp8(stored: LinearFormat, n_out: int, n_in: int) -> dict[str, Part]:
    scales = {
        "fp8_tensor": Part((), jnp.float32, NOTHING),
        "fp8_channel": Part((n_out,), jnp.float32, ROWS),
        "fp8_block": Part((blocks(n_out), blocks(n_in)), jnp.float32, ROWS_AND_COLUMNS),
    }
    parts = {"weight": Part((n_out, n_in), FP8, ROWS_AND_COLUMNS), "weight_scale": scales[stored.format]}
    if stored.activations == "static":
        parts["input_scale"] = Part((), jnp.float32, NOTHING)
    return parts


def _nvfp4(stored: LinearFormat, n_out: int, n_in: int) -> dict[str, Part]:
    parts = {
        "weight_packed": Part((n_out, n_in // 2), jnp.uint8, ROWS_AND_COLUMNS),
        "weight_scale": Part((n_out, n_in // nvfp4.GROUP), FP8, ROWS_AND_COLUMNS),
        "weight_global_scale": Part((), jnp.float32, NOTHING),
    }
    if stored.activations != "none":
        parts["input_global_scale"] = Part((), jnp.float32, NOTHING)
    return parts


def _nf4(stored: LinearFormat, n_out: int, n_in: int) -> dict[str, Part]:
    n_blocks = math.ceil(n_in / nf4.BLOCK)
    parts = {
        "weight_packed": Part((n_out, n_in // 2), jnp.uint8, ROWS_AND_COLUMNS),
        "weight_absmax": Part((n_out, n_blocks), jnp.int8 if stored.double else jnp.float32, ROWS_AND_COLUMNS),
    }
    if stored.double:
        parts["weight_absmax_scale"] = Part((n_out,), jnp.bfloat16, ROWS)
        parts["weight_absmax_offset"] = Part((n_out,), jnp.float32, ROWS)
    return parts


_PARTS = {
    "int8_channel": _int8,
    "fp8_tensor": _fp8,
    "fp8_channel": _fp8,
    "fp8_block": _fp8,
    "nvfp4": _nvfp4,
    "nf4": _nf4,
}

_BLOCKS = {"fp8_block": (BLOCK, BLOCK), "nvfp4": (1, nvfp4.GROUP), "nf4": (1, nf4.BLOCK)}

# What the columns of a matrix must be a multiple of.
COLUMNS = {"nvfp4": nvfp4.GROUP, "nf4": 2}
