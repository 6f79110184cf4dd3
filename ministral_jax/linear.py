"""The one projection of the model: dense or quantised, with any low-rank adapter. Weights stay `[out, in]`, as given.

What a projection holds is decided here and nowhere else; layers only call it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .parameters import ParameterSpec
from .quantization import LinearFormat, QuantizedWeight
from .sharding.block_products import goes_by_blocks, product_by_blocks
from .sharding.layout import Layout


@dataclass(frozen=True)
class LowRank:
    """What an adapter is beside its matrices: their rank, the factor of `B A x`, and dropout before A in training."""

    rank: int
    scale: float
    dropout: float = 0.0


class DropoutKey(nnx.Variable):
    """The random key of one projection's dropout; in a stack of layers one for each, along the leading axis."""


class Linear(nnx.Module):
    """`x @ weight.T` without bias; `axes` are the logical axes of (out, in). Built dense; `store_as` changes that.

    On a mesh, XLA derives how products are split, but for formats that go block by block: for these `layout` says it.

    With an adapter, `+ scale * B A x` (Hu et al. 2021, arXiv 2106.09685, section 4.1).
    """

    lora_a: nnx.Param
    lora_b: nnx.Param

    def __init__(self, n_out: int, n_in: int, axes: tuple[str, str], dtype: DTypeLike) -> None:
        self.shape = (n_out, n_in)
        self.axes = axes
        self.stored: LinearFormat | None = None
        self.layout: Layout | None = None
        self.adapter: LowRank | None = None
        self.dropout_key: DropoutKey | None = nnx.data(None)
        self.weight = ParameterSpec(self.shape, axes, dtype).placeholder()

    def store_as(self, stored: LinearFormat) -> None:
        """Replaces the dense placeholder by those of a quantised format."""
        del self.weight
        self.stored = stored
        for name, spec in stored.specs(*self.shape, self.axes).items():
            setattr(self, name, spec.placeholder())

    def adapt(self, adapter: LowRank) -> None:
        """Adds placeholders of an adapter, in float32: `lora_a` [R, in] and `lora_b` [out, R]."""
        n_out, n_in = self.shape
        self.adapter = adapter
        down = ParameterSpec((adapter.rank, n_in), ("rank", self.axes[1]), jnp.float32, "fan_in", adapter=True)
        up = ParameterSpec((n_out, adapter.rank), (self.axes[0], "rank"), jnp.float32, "zeros", adapter=True)
        self.lora_a, self.lora_b = down.placeholder(), up.placeholder()

    def remove_adapter(self) -> None:
        """The projection as it was before `adapt`."""
        del self.lora_a, self.lora_b
        self.adapter = self.dropout_key = None

    def quantized_weight(self) -> QuantizedWeight:
        """The payload and scales of a projection that is not dense, as one weight."""
        assert self.stored is not None, "this projection is dense"
        return self.stored.weight(self._parts(self.stored))

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        """What the projection multiplies by, whole and dense, any adapter included."""
        weight = self.weight[...] if self.stored is None else self.quantized_weight().dequantize(dtype)
        if self.adapter is None:
            return weight.astype(dtype)
        change = jnp.einsum("RI,OR->OI", self.lora_a[...], self.lora_b[...])
        return (weight.astype(jnp.float32) + self.adapter.scale * change).astype(dtype)

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        product = self._product(x)
        if self.adapter is None:
            return product
        low: Any = low_rank_product(self._dropped(x), self.lora_a[...], self.lora_b[...], self.adapter.scale)
        return product + low

    def _product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        if self.stored is None:
            return jnp.einsum("...I,OI->...O", x, self.weight[...])
        parts = self._parts(self.stored)
        if self.layout is not None and goes_by_blocks(self.stored):
            return product_by_blocks(self.stored, parts, x, self.shape, self.axes, self.layout)
        return self.stored.product(parts, x)

    def _parts(self, stored: LinearFormat) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in stored.parts(*self.shape)}

    def _dropped(self, x: Float[Array, "*T I"]) -> Float[Array, "*T I"]:
        """`x` with a random share of its numbers zero and the others larger for it, where there is a key."""
        if self.adapter is None or self.dropout_key is None or not self.adapter.dropout:
            return x
        kept = 1.0 - self.adapter.dropout
        mask = jax.random.bernoulli(self.dropout_key[...], kept, x.shape)
        return jnp.where(mask, x / kept, 0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank_product(
    x: Float[Array, "*T I"], down: Float[Array, "R I"], up: Float[Array, "O R"], scale: float
) -> Float[Array, "*T O"]:
    """`scale * B A x` in the dtype of `x`, in which the matrices act too, kept though they are in more bits.

    `scale` is applied to the few numbers of `A x`, and no array of the width of the projection is made in float32, so
    that libraries add this product and `W x` in one pass. Differentiable once; gradients of the matrices are summed in
    float32.
    """
    return _low_rank_forward(x, down, up, scale)[0]


def _low_rank_forward(x: Array, down: Array, up: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    inner = (scale * _contract("...I,RI->...R", x, down.astype(x.dtype))).astype(x.dtype)
    return jnp.einsum("...R,OR->...O", inner, up.astype(x.dtype)), (x, down, up, inner)


def _low_rank_backward(scale: float, residuals: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
    x, down, up, inner = residuals
    d_inner = (scale * _contract("...O,OR->...R", d_out, up.astype(x.dtype))).astype(x.dtype)
    d_x = jnp.einsum("...R,RI->...I", d_inner, down.astype(x.dtype))
    # The operand of R columns comes first: XLA's CPU backend transposes that one, and the other is many times larger.
    # In 16 bits it has no product whose result is transposed.
    d_up = _over_tokens(inner, d_out).T if x.dtype == jnp.float32 else _over_tokens(d_out, inner)
    return d_x, _over_tokens(d_inner, x).astype(down.dtype), d_up.astype(up.dtype)


_contract: Any = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _over_tokens(one: Float[Array, "*T R"], other: Float[Array, "*T I"]) -> Float[Array, "R I"]:
    """`one.T @ other`, summed over all tokens in float32."""
    tokens = tuple(range(one.ndim - 1))
    return lax.dot_general(one, other, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def projections(model: nnx.Module) -> dict[str, Linear]:
    """Name -> every projection of a model, in the model's own order."""
    found = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Linear))
    return {".".join(map(str, path)): module for path, module in found}
