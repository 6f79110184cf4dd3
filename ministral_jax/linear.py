"""The one projection of the model: dense or quantised. Weights stay `[out, in]`, as published.

What a projection holds is decided here and nowhere else; layers only call it.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .parameters import ParameterSpec
from .quantization import LinearFormat, QuantizedProduct, QuantizedWeight


class Linear(nnx.Module):
    """`x @ weight.T` without bias; `axes` are the logical axes of (out, in). Built dense; `store_as` changes that."""

    def __init__(self, n_out: int, n_in: int, axes: tuple[str, str], dtype: DTypeLike) -> None:
        self.shape = (n_out, n_in)
        self.axes = axes
        self.stored: LinearFormat | None = None
        self.weight = ParameterSpec(self.shape, axes, dtype).placeholder()

    def store_as(self, stored: LinearFormat) -> None:
        """Replaces the dense placeholder by those of a quantised format."""
        del self.weight
        self.stored = stored
        for name, spec in stored.specs(*self.shape, self.axes).items():
            setattr(self, name, spec.placeholder())

    def quantized_weight(self) -> QuantizedWeight:
        """The payload and scales of a projection that is not dense, as one weight."""
        assert self.stored is not None, "this projection is dense"
        return self.stored.weight({name: getattr(self, name)[...] for name in self.stored.parts(*self.shape)})

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        if self.stored is None:
            return jnp.einsum("...I,OI->...O", x, self.weight[...])
        weight = self.quantized_weight()
        if self.stored.activations != "none" and isinstance(weight, QuantizedProduct):
            return weight.quantized_product(x)
        return weight.product(x)


def projections(model: nnx.Module) -> dict[str, Linear]:
    """Name -> every projection of a model, in the model's own order."""
    found = ((path, module) for path, module in nnx.iter_modules(model) if isinstance(module, Linear))
    return {".".join(map(str, path)): module for path, module in found}
