"""Parameters by name: what a module's weights are before they exist, and how they are filled in.

A model is built abstract. Every weight starts as a placeholder that knows its shape, dtype, logical axes and
initialiser; shapes, shardings and the plan for reading a checkpoint all follow from that one tree. Names are those of
the mistral layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Initializer = Literal["normal", "ones", "zeros", "fan_in", "stored"]
Module = TypeVar("Module", bound=nnx.Module)


class AdapterParam(nnx.Param):
    """A matrix of a low-rank adapter: what LoRA trains while every other parameter stays as it is."""


@dataclass(frozen=True)
class ParameterSpec:
    """One weight: shape, a logical axis name per dimension, dtype, and how it is drawn when trained from scratch.

    "fan_in" is uniform within the inverse root of the columns (Kaiming's with a = sqrt 5). A "stored" one is never
    drawn: it is part of a quantised weight and comes from a file. An `adapter` one is an AdapterParam.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: DTypeLike
    init: Initializer = "normal"
    adapter: bool = False

    def placeholder(self) -> nnx.Param:
        """A parameter without memory behind it."""
        kind = AdapterParam if self.adapter else nnx.Param
        return kind(jax.ShapeDtypeStruct(self.shape, self.dtype), axes=self.axes, init=self.init)

    def draw(self, key: jax.Array, std: float) -> jax.Array:
        """An initial value. Raises ValueError for a part of a quantised weight."""
        if self.init == "stored":
            raise ValueError("is part of a quantised weight, which is never drawn: quantise a dense one")
        if self.init == "ones":
            return jnp.ones(self.shape, self.dtype)
        if self.init == "zeros":
            return jnp.zeros(self.shape, self.dtype)
        if self.init == "fan_in":
            bound = self.shape[-1] ** -0.5
            return jax.random.uniform(key, self.shape, jnp.float32, -bound, bound).astype(self.dtype)
        return (std * jax.random.normal(key, self.shape, jnp.float32)).astype(self.dtype)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def parameter_specs(model: nnx.Module) -> dict[str, ParameterSpec]:
    """Name -> what it is, for every weight of an abstract or filled model, in the model's own order."""
    return {
        _name(path): ParameterSpec(
            tuple(leaf.shape), leaf.axes, jnp.dtype(leaf.dtype), leaf.init, isinstance(leaf, AdapterParam)
        )
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def parameters(model: nnx.Module) -> dict[str, jax.Array]:
    """Name -> array of a filled model."""
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def fill(model: Module, arrays: Mapping[str, Any] | Callable[[str, ParameterSpec], Any]) -> Module:
    """A new model whose weights are `arrays[name]` or `arrays(name, spec)`.

    Raises ValueError for an array whose shape is not its placeholder's.
    """
    graph, state = nnx.split(model)
    specs = parameter_specs(model)
    get = arrays if callable(arrays) else lambda name, spec: arrays[name]
    flat = nnx.to_flat_state(state)
    filled = []
    for path, leaf in flat:
        name = _name(path)
        array = get(name, specs[name])
        if tuple(array.shape) != specs[name].shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, the model expects {specs[name].shape}")
        filled.append((path, leaf.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def initialize(model: Module, key: jax.Array, *, std: float = 0.02) -> Module:
    """Draws every weight: normal with standard deviation `std`, ones for norms, as the specs say for adapters.

    Deterministic in `key`.
    """
    specs = parameter_specs(model)
    keys = dict(zip(specs, jax.random.split(key, len(specs)), strict=True))

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        try:
            return spec.draw(keys[name], std)
        except ValueError as problem:
            raise ValueError(f"{name} {problem}") from None

    return fill(model, draw)
