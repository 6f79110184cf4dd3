"""What every quantised matrix can do, and the contractions they share. The formats are in the files beside this."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@runtime_checkable
class QuantizedWeight(Protocol):
    """A matrix [O, I] in few bits: a pytree of payload and scales."""

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "O I"]:
        """The matrix that the file means: computed in float32, then rounded to `dtype`."""
        ...

    def product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` in the dtype of `x`, activations as they are."""
        ...


@runtime_checkable
class QuantizedProduct(QuantizedWeight, Protocol):
    """A matrix whose format rounds activations too."""

    def quantized_product(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        """`x @ W.T` in the dtype of `x`, activations rounded as the format says."""
        ...


def contract(x: Float[Array, "*T I"], weight: Float[Array, "O I"]) -> Float[Array, "*T O"]:
    """`x @ weight.T` summed in float32."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def is_one_token(x: Float[Array, "*T I"]) -> bool:
    """Whether `x` is a single vector, as when one sequence decodes."""
    return math.prod(x.shape[:-1]) == 1


def vector_product(x: Float[Array, "I"], values: Float[Array, "O I"], scale: Float[Array, "O I"]) -> Float[Array, "O"]:
    """`sum over i of values[o, i] * scale[o, i] * x[i]` in float32, of values that are computed from fewer bits.

    A sum of products, not a dot: compilers fuse into it whatever gives the values, and write no matrix of them to
    memory, which is what decoding one sequence costs.
    """
    return jnp.sum(values.astype(jnp.float32) * scale * x.astype(jnp.float32), axis=1)
