"""A mesh together with rules: what model code asks where an array lies. Immutable, hashable, and static under jit."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ..config import ModelConfig
from ..errors import ShardingError
from ..parameters import ParameterSpec
from .rules import MESH_AXES, RULES, Rules, fitting, partition

logger = logging.getLogger("ministral_jax")


@dataclass(frozen=True)
class Layout:
    """Where arrays with logical axes lie: `rules` applied to `mesh`, whose axes are MESH_AXES."""

    mesh: Mesh | AbstractMesh
    rules: Rules

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> how many devices lie along it."""
        return dict(self.mesh.shape)

    @property
    def platform(self) -> str | None:
        """Of the devices of the mesh; None where it has none yet."""
        return None if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat[0].platform

    def ways(self, logical: str) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.sizes[axis] for axis in self.along(logical))

    def along(self, logical: str) -> tuple[str, ...]:
        """The mesh axes, larger than 1, that a logical axis is split along."""
        return tuple(axis for axis in self.rules.along(logical) if self.sizes[axis] > 1)

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical names, None for one that is never split."""
        return partition(axes, self.rules, self.sizes)

    def sharding(self, axes: Sequence[str | None] = ()) -> NamedSharding:
        """The same as a sharding; of no axes, a copy on every device."""
        return NamedSharding(self.mesh, self.spec(axes))

    def placement(self, name: str, spec: ParameterSpec) -> NamedSharding:
        """Where a parameter lies. Raises ShardingError for a dimension that does not divide."""
        return NamedSharding(self.mesh, partition(weight_axes(spec, self), self.rules, self.sizes,
                                                  shape=spec.shape, name=name))  # fmt: skip

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`x`, told to lie so from here on; inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def constrain_last(self, x: Array, axis: str) -> Array:
        """`x`, told how its last dimension lies, the others as they come."""
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
        spec = PartitionSpec(*free, self.along(axis) or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def put(self, tree: Any, *axes: str | None) -> Any:
        """Host arrays with the same logical axes, onto the devices. Every process gives the whole arrays."""
        sharding = self.sharding(axes)

        def spread(x: Any) -> Array:
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(spread, tree)


def weight_axes(spec: ParameterSpec, layout: Layout) -> tuple[str | None, ...]:
    """Logical axes of a parameter. Scales of a quantised weight that do not divide along an axis stay whole there."""
    if spec.init != "stored":
        return tuple(spec.axes)
    return tuple(
        axis if size % layout.ways(axis) == 0 else None for axis, size in zip(spec.axes, spec.shape, strict=True)
    )


def sequence_axes(shape: tuple[int, ...], layout: Layout | None) -> tuple[str | None, str | None]:
    """Logical axes of tokens [B, T]. Sequences too few for the mesh are not split: every device computes them all."""
    if layout is None:
        return (None, None)
    if shape[1] % layout.ways("sequence"):
        raise ShardingError(
            f"sequences of {shape[1]} tokens do not divide over context={layout.ways('sequence')}: pad them"
        )
    return ("batch" if shape[0] % layout.ways("batch") == 0 else None, "sequence")


def token_axes(shape: tuple[int, ...], layout: Layout) -> tuple[str | None, ...]:
    """Logical axes of tokens, packed [T] or in sequences [B, T]."""
    return ("rows",) if len(shape) == 1 else sequence_axes(shape, layout)


def layout_for(config: ModelConfig, mesh: Mesh | AbstractMesh, rules: Rules | str = "all") -> Layout:
    """The layout of a model on a mesh, after checking that its heads and widths divide.

    Key heads fewer than the `tensor` axis are repeated, each on as many devices as it takes, which is logged. Raises
    ShardingError naming the sizes that would do.
    """
    chosen = _rules(rules) if isinstance(rules, str) else rules
    if tuple(mesh.axis_names) != MESH_AXES:
        raise ShardingError(
            f"the mesh has axes {', '.join(map(str, mesh.axis_names))}: expected {', '.join(MESH_AXES)}; make it with "
            "ministral_jax.sharding.meshes.make_mesh"
        )
    layout = Layout(mesh, chosen)
    idle = [axis for axis, size in layout.sizes.items() if size > 1 and axis not in chosen.mesh_axes]
    if idle:
        raise ShardingError(
            f"mesh axis {idle[0]}={layout.sizes[idle[0]]}: rules {chosen.name!r} split nothing along it; they use "
            f"{', '.join(axis for axis in MESH_AXES if axis in chosen.mesh_axes)}"
        )
    require_heads_divide(config, layout.ways("heads"))
    repeats = layout.ways("act_kv_heads") // config.n_kv_heads
    if repeats > 1 and config.latent is None:
        logger.warning(
            "%d key heads on tensor=%d: each is kept by %d devices, and a cache takes %d times the memory",
            config.n_kv_heads, layout.ways("act_kv_heads"), repeats, repeats,
        )  # fmt: skip
    return layout


def _rules(name: str) -> Rules:
    if name not in RULES:
        raise ShardingError(f"no rules called {name!r}: expected one of {', '.join(RULES)}")
    return RULES[name]


def require_heads_divide(config: ModelConfig, tensor: int) -> None:
    """Raises ShardingError unless every device can compute whole heads: query heads divide, key heads divide or are
    repeated."""
    if config.n_heads % tensor:
        raise ShardingError(
            f"tensor={tensor} does not divide the {config.n_heads} query heads; sizes that do: "
            f"{fitting(config.n_heads)}"
        )
    if config.latent is None and config.n_kv_heads % tensor and tensor % config.n_kv_heads:
        raise ShardingError(
            f"tensor={tensor} and {config.n_kv_heads} key heads: neither divides the other; sizes that do: "
            f"{_kv_sizes(config)}"
        )


def _kv_sizes(config: ModelConfig) -> str:
    heads, keys = config.n_heads, config.n_kv_heads
    return ", ".join(str(t) for t in range(1, heads + 1) if heads % t == 0 and (keys % t == 0 or t % keys == 0))
