"""The part of `ministral inspect` that shows a model on a mesh: how each parameter is split, and whether all fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .output import size, write

if TYPE_CHECKING:
    from ..sharding.plan import ShardingPlan


@dataclass(frozen=True)
class MeshPlan:
    """What a mesh's devices hold, and the memory of one in bytes, None if it is not known."""

    sharding: ShardingPlan
    device_memory: int | None

    def to_json(self) -> dict[str, Any]:
        fits = None if self.device_memory is None else self.sharding.fits(self.device_memory)
        return {**self.sharding.to_json(), "device_memory": self.device_memory, "fits": fits}

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        if self.device_memory is None:
            return "unknown: give --device-memory, such as 16GB or v5e"
        memory = size(self.device_memory)
        if self.sharding.fits(self.device_memory):
            return f"fits {memory}, of which a tenth is left for activations and programs"
        if self.sharding.device_bytes <= self.device_memory:
            return f"does not fit {memory}: too little is left for activations and programs"
        return f"does not fit {memory}"


def detected_memory() -> int | None:
    """Bytes of the first device's memory, None for a CPU or a backend that does not say."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats.get("bytes_limit") if stats else None


def show_mesh_plan(plan: MeshPlan) -> None:
    """The table on stdout: parameters of all layers in one row, then totals."""
    sharding = plan.sharding
    rows = [
        (
            one.name + (f" x {one.count}" if one.count > 1 else ""),
            "x".join(map(str, one.shape)) or "1",
            one.shown_spec,
            one.dtype,
            size(one.count * one.device_bytes),
        )
        for one in sharding.parameters
    ]
    head = ("parameter", "shape", "split along", "dtype", "on a device")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    write(f"on {sharding.n_devices} devices, mesh {sharding.mesh}, rules {sharding.rules}\n")
    for row in [head, *rows]:
        write("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    for name, value in (
        ("weights", size(sharding.weight_bytes)),
        ("cache", f"{size(sharding.cache_bytes)}, for {sharding.batch} x {sharding.length:,} tokens"),
        ("together", f"{size(sharding.device_bytes)} on each device: {plan.verdict}"),
    ):
        write(f"  {name:<14}{value}\n")
