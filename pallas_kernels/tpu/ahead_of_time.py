"""Compiles for TPUs that are not here: with the libtpu wheel alone, a machine without a chip compiles to machine code.

Nothing can be run. Set `ALLOW_MULTIPLE_LIBTPU_LOAD=1` where another process may use libtpu too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from .block_sizes import Generation

TOPOLOGIES: dict[Generation, tuple[str, dict[str, Any]]] = {
    "v5e": ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "v6e": ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}


class AbsentChip(NamedTuple):
    """One device of a generation: where its arrays would lie, and the mesh that tells kernels what they compile for."""

    sharding: jax.sharding.SingleDeviceSharding
    mesh: jax.sharding.AbstractMesh


def absent_chip(generation: Generation) -> AbsentChip:
    """A device of `generation`, from libtpu's description of it."""
    name, bounds = TOPOLOGIES[generation]
    device = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices[0]
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return AbsentChip(
        jax.sharding.SingleDeviceSharding(device), jax.sharding.AbstractMesh((), (), abstract_device=kind)
    )


def absent_slice(name: str) -> list[Any]:
    """The devices of a slice such as "v5e:2x2" or "v6e:2x4", for a mesh that tells kernels what they compile for."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def compile_for(
    generation: Generation,
    function: Callable[..., Any],
    *arguments: Any,
    donate: Sequence[int] = (),
    options: Callable[[], Any] | None = None,
) -> jax.stages.Compiled:
    """`function` compiled to machine code of one chip. Arguments are arrays or their shapes and dtypes.

    `options` gives the compiler's, asked while the chip is the target.
    """
    chip = absent_chip(generation)
    with jax.sharding.use_abstract_mesh(chip.mesh):
        staged = jax.jit(
            function, in_shardings=chip.sharding, out_shardings=chip.sharding, donate_argnums=tuple(donate)
        )
        return staged.lower(*arguments).compile(compiler_options=options() if options else None)
