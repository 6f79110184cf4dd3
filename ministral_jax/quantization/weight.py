"""What every quantised matrix can do, and the contractions they share. The formats are in the files beside this."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Of the numbers that a product of several tokens is made of, on a GPU: a third of what an H200 caches.
SET_BYTES = 16 * 2**20

# From here on the product of a weight takes at least as long as writing and reading it in 16 bits, on v6e.
MANY_TOKENS = 1024


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


def frozen_product(weight: QuantizedWeight, x: Float[Array, "*T I"], *, rounded: bool) -> Float[Array, "*T O"]:
    """`weight.product(x)`, or with `rounded` its `quantized_product(x)`. The gradient of both is that of the first.

    A weight in few bits has no gradient, and its values are made again for that of `x`: kept for the backward pass,
    those of all layers would be the dense model. Rounding has no slope, so that nothing would reach the layers below;
    it is passed by, as if it were not there (straight-through, Bengio et al. 2013, arXiv 1308.3432).
    """
    arrays, structure = jax.tree.flatten(weight)
    return _frozen_product(structure, rounded, arrays, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_product(structure: Any, rounded: bool, arrays: list[Array], x: Array) -> Array:
    weight = jax.tree.unflatten(structure, arrays)
    return weight.quantized_product(x) if rounded else weight.product(x)


def _frozen_forward(
    structure: Any, rounded: bool, arrays: list[Array], x: Array
) -> tuple[Array, tuple[list[Array], Array]]:
    return _frozen_product(structure, rounded, arrays, x), (arrays, x)


def _frozen_backward(
    structure: Any, rounded: bool, residuals: tuple[list[Array], Array], d_out: Array
) -> tuple[None, Array]:
    del rounded
    arrays, x = residuals
    return None, jax.vjp(jax.tree.unflatten(structure, arrays).product, x)[1](d_out)[0]


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


def contract_halves(
    columns: Sequence[Float[Array, "*T half"]], matrices: Sequence[Float[Array, "O half"]]
) -> Float[Array, "*T O"]:
    """`x @ W.T` summed in float32, of W's even and odd columns and those of `x`.

    With MANY_TOKENS a TPU gets W as an array of its own. As a part of the product few bits would be decoded again for
    every tile of tokens, and the compiler takes eight times as long over it.
    """

    def apart() -> Array:
        return contract(columns[0], matrices[0]) + contract(columns[1], matrices[1])

    def at_once() -> Array:
        return contract(jnp.concatenate(columns, -1), lax.optimization_barrier(jnp.concatenate(matrices, 1)))

    if math.prod(columns[0].shape[:-1]) < MANY_TOKENS:
        return apart()
    return lax.platform_dependent(tpu=at_once, default=apart)


def contract(x: Float[Array, "*T I"], weight: Float[Array, "O I"]) -> Float[Array, "*T O"]:
    """`x @ weight.T` summed in float32."""
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def in_row_blocks(
    product: Callable[..., Float[Array, "*T rows"]], arrays: tuple[Array, ...], n_in: int
) -> Float[Array, "*T O"]:
    """`product(*arrays)` of all rows of a matrix [O, n_in]; on a GPU of one set of rows after the other.

    There XLA writes what a product is made of to memory, two bytes a number: sets are so small that they stay in the
    cache, 16 MiB. Set j is every row whose number is j modulo their count, so that rows may be spread over devices.
    The backward pass computes a set again.
    """
    n_out = len(arrays[0])
    wanted = -(-2 * n_out * n_in // SET_BYTES)
    count = next(count for count in range(wanted, n_out + 1) if n_out % count == 0)

    def one_by_one() -> Float[Array, "*T O"]:
        @jax.checkpoint
        def of_set(j: Array) -> Array:
            sets = (array.reshape(n_out // count, count, *array.shape[1:]) for array in arrays)
            return product(*(lax.dynamic_index_in_dim(rows, j, axis=1, keepdims=False) for rows in sets))

        products = lax.scan(lambda _, j: (None, of_set(j)), None, jnp.arange(count))[1]  # [count, *T, O / count]
        return jnp.moveaxis(products, 0, -1).reshape(*products.shape[1:-1], n_out)

    if count == 1:
        return product(*arrays)
    return lax.platform_dependent(cuda=one_by_one, default=lambda: product(*arrays))


def is_one_token(x: Float[Array, "*T I"]) -> bool:
    """Whether `x` is a single vector, as when one sequence decodes."""
    return math.prod(x.shape[:-1]) == 1


def vector_product(x: Float[Array, "I"], values: Float[Array, "O I"], scale: Float[Array, "O I"]) -> Float[Array, "O"]:
    """`sum over i of values[o, i] * scale[o, i] * x[i]` in float32, of values that are computed from fewer bits.

    A sum of products, not a dot: compilers fuse into it whatever gives the values, and write no matrix of them to
    memory, which is what decoding one sequence costs.
    """
    return jnp.sum(values.astype(jnp.float32) * scale * x.astype(jnp.float32), axis=1)
