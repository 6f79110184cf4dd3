"""What a model takes of each device of a mesh, parameter by parameter, before there are devices. Makes no arrays."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jax.typing import DTypeLike

from ..cache import CachePlan, plan_cache
from ..config import ModelConfig
from ..errors import ShardingError
from ..linear import projections
from ..parameters import ParameterSpec, parameter_specs
from ..quantization import LinearFormat
from ..quantization.formats import DENSE_LATENT
from ..transformer import Transformer
from .layout import Layout, layout_for
from .meshes import REST, show_mesh
from .rules import MESH_AXES, Rules

GIB = 2**30
# Memory of a device as its maker gives it, in GiB; a TPU's by core where the runtime shows cores as devices.
DEVICE_MEMORY: Mapping[str, int] = {
    "v4": 32,
    "v5e": 16,
    "v5p": 95,
    "v6e": 32,
    "tpu7x": 96,
    "a100-40": 40,
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "rtx4090": 24,
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# What weights and cache may take of it: programs, activations and what the runtime keeps have to go somewhere.
USABLE = 0.9


@dataclass(frozen=True)
class ParameterPlan:
    """Parameters that differ in nothing but the number of their layer: `name` has a star in its place."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    device_bytes: int

    @property
    def shown_spec(self) -> str:
        """The mesh axes of each dimension, "-" for one that is whole everywhere."""
        entries = [*self.spec, *[None] * (len(self.shape) - len(self.spec))]
        return " ".join("+".join((entry,) if isinstance(entry, str) else entry or ("-",)) for entry in entries) or "-"


@dataclass(frozen=True)
class ShardingPlan:
    """Bytes on each device; of devices that differ, the fullest. Activations and programs are not counted."""

    mesh: str
    rules: str
    n_devices: int
    parameters: tuple[ParameterPlan, ...]
    cache_bytes: int
    batch: int
    length: int

    @property
    def weight_bytes(self) -> int:
        return sum(one.count * one.device_bytes for one in self.parameters)

    @property
    def device_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    def fits(self, device_memory: int) -> bool:
        """Whether it leaves a tenth of the device's memory, in bytes, for everything else."""
        return self.device_bytes <= USABLE * device_memory

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, totals included."""
        rows = [{**dataclasses.asdict(one), "spec": one.shown_spec} for one in self.parameters]
        totals = {"weight_bytes": self.weight_bytes, "device_bytes": self.device_bytes}
        return {**dataclasses.asdict(self), "parameters": rows, **totals}


def abstract_layout(config: ModelConfig, sizes: Mapping[str, int], rules: Rules | str = "all") -> Layout:
    """The layout of a model on a mesh of these sizes whose devices need not exist; checked as for real ones."""
    if REST in sizes.values():
        raise ShardingError(f"mesh {show_mesh(sizes).replace('-1', '*')}: '*' needs devices to count; give every size")
    mesh = AbstractMesh(
        tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )
    return layout_for(config, mesh, rules)


def plan_sharding(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: DTypeLike = jnp.bfloat16,
    batch: int = 1,
    length: int | None = None,
    chunk: int = 512,
    page_size: int = 64,
    platform: str | None = None,
) -> ShardingPlan:
    """Where every parameter lies and what it takes, with the cache of `batch` sequences of `length` tokens.

    Projections are planned in the config's quantised format where it has one, and the cache as devices of `platform`
    keep it, by default those that are here. Raises ShardingError for a parameter that does not divide.
    """
    length = config.max_length if length is None else length
    rows: dict[ParameterPlan, int] = {}
    for name, spec in parameter_specs(planned_model(config, dtype)).items():
        row = _plan_parameter(name, spec, layout)
        rows[row] = rows.get(row, 0) + 1
    cache = plan_cache(
        config, batch=-(-batch // layout.ways("rows")), length=length, chunk=chunk, page_size=page_size,
        dtype=jnp.dtype(cache_dtype), layout=layout, platform=platform,
    )  # fmt: skip
    return ShardingPlan(
        mesh=show_mesh(layout.sizes),
        rules=layout.rules.name,
        n_devices=math.prod(layout.sizes.values()),
        parameters=tuple(dataclasses.replace(row, count=count) for row, count in rows.items()),
        cache_bytes=_cache_bytes(config, cache, layout),
        batch=batch,
        length=length,
    )


def planned_model(config: ModelConfig, dtype: DTypeLike, layout: Layout | None = None) -> Transformer:
    """The model, abstract, with its projections stored as published files of the config's format have them.

    Embeddings, head, routers, what reads images, and DENSE_LATENT of latent attention are in `dtype`.
    """
    model = Transformer(config, dtype, layout=layout)
    if config.quantization:
        stored = LinearFormat(config.quantization.format, config.quantization.activations)
        for name, linear in projections(model).items():
            if name.startswith("layers.") and name.rpartition(".")[2] not in DENSE_LATENT[stored.format]:
                linear.store_as(stored)
    return model


def _plan_parameter(name: str, spec: ParameterSpec, layout: Layout) -> ParameterPlan:
    sharding = layout.placement(name, spec)
    local = sharding.shard_shape(spec.shape)
    return ParameterPlan(
        name=re.sub(r"(?<=layers\.)\d+", "*", name),
        count=1,
        shape=spec.shape,
        dtype=jnp.dtype(spec.dtype).name,
        spec=sharding.spec,
        device_bytes=math.prod(local) * jnp.dtype(spec.dtype).itemsize,
    )


def _cache_bytes(config: ModelConfig, plan: CachePlan, layout: Layout) -> int:
    heads = 1 if config.latent else layout.ways("act_kv_heads")
    return sum(group.n_bytes // (group.context * heads) for group in plan.groups)


def parse_memory(text: str) -> int:
    """Bytes of a device's memory from "16GB", "80GiB" or a name in DEVICE_MEMORY."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([GM])(i?)B", text, re.IGNORECASE)
    if match:
        power = {"g": 3, "m": 2}[match[2].lower()]
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if text.lower() not in DEVICE_MEMORY:
        raise ShardingError(
            f"device memory {text[:40]!r}: expected a size such as 16GB or one of {', '.join(DEVICE_MEMORY)}"
        )
    return DEVICE_MEMORY[text.lower()] * GIB


def platform_of(memory: str | None) -> str | None:
    """What kind of device a name in DEVICE_MEMORY is; None for a size or no word."""
    if memory is None or memory.lower() not in DEVICE_MEMORY:
        return None
    return "tpu" if memory.lower() in TPUS else "gpu"
