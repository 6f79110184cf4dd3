"""Meshes: from text such as "fsdp=4,tensor=2", or from the model and the devices that are there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ..config import ModelConfig
from ..errors import ShardingError
from .rules import MESH_AXES

REST = -1
# Tensor parallelism talks twice a layer: beyond the devices of one board or host it costs more than it gives.
LARGEST_TENSOR = 8

Sizes = dict[str, int]


def parse_mesh(text: str) -> Sizes:
    """Mesh axis -> size from "fsdp=4,tensor=2"; "*" takes the devices that are left, as in "fsdp=*,tensor=2".

    Axes that are not named have size 1. Raises ShardingError for anything else.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen: set[str] = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([a-z]+)=([0-9]{1,6}|\*)", part)
        if match is None or match[1] not in MESH_AXES or match[1] in seen or match[2] == "0" * len(match[2]):
            raise ShardingError(
                f"mesh {text[:80]!r}: cannot read {part[:40]!r}; expected sizes of {', '.join(MESH_AXES)}, each once, "
                "such as fsdp=4,tensor=2"
            )
        seen.add(match[1])
        sizes[match[1]] = REST if match[2] == "*" else int(match[2])
    if list(sizes.values()).count(REST) > 1:
        raise ShardingError(f"mesh {text[:80]!r}: only one axis can take the devices that are left")
    return sizes


def show_mesh(sizes: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads, axes of size 1 left out."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def with_rest(sizes: Mapping[str, int], n_devices: int) -> Sizes:
    """The sizes with `*` filled in for `n_devices`. Raises ShardingError if the others do not divide them."""
    known = math.prod(size for size in sizes.values() if size != REST)
    if REST in sizes.values() and n_devices % known:
        raise ShardingError(
            f"{n_devices} devices do not divide by the {known} of the axes given: nothing whole is left for the other"
        )
    return {axis: n_devices // known if size == REST else size for axis, size in sizes.items()}


def make_mesh(sizes: Mapping[str, int] | str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes over `devices`, by default all; its axes are MESH_AXES, with Auto axis types.

    Neighbours on a TPU's torus are neighbours in the mesh, innermost axes first. Over several slices, which only the
    data centre network joins, the outermost axes go between slices. Fewer devices than there are is fine in a
    single process. Raises ShardingError if there are too few.
    """
    found = list(jax.devices() if devices is None else devices)
    full = with_rest(parse_mesh(sizes) if isinstance(sizes, str) else {**dict.fromkeys(MESH_AXES, 1), **sizes},
                     len(found))  # fmt: skip
    wanted = math.prod(full.values())
    if wanted > len(found):
        raise ShardingError(
            f"mesh {show_mesh(full)} takes {wanted} devices: there are {len(found)} ({found[0].device_kind})"
        )
    if wanted < len(found) and len({device.process_index for device in found}) > 1:
        raise ShardingError(
            f"mesh {show_mesh(full)} takes {wanted} of {len(found)} devices: with several processes it has to take all"
        )
    shape = tuple(full[axis] for axis in MESH_AXES)
    return Mesh(_arranged(shape, found[:wanted]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between, within = [], []
    for size in shape:
        across = math.gcd(size, slices)
        between.append(across)
        within.append(size // across)
        slices //= across
    if slices > 1:
        raise ShardingError(
            f"mesh {show_mesh(dict(zip(MESH_AXES, shape, strict=True)))} does not divide over the slices of these "
            "devices: make the size of an outer axis (data, fsdp) a multiple of the number of slices"
        )
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def default_sizes(config: ModelConfig, n_devices: int, *, training: bool = False) -> Sizes:
    """A sensible mesh for a model: to generate, `tensor`, then experts apart where it has them; to train, experts
    apart, then `fsdp`.

    `tensor` is the largest divisor of the devices, up to LARGEST_TENSOR, over which heads and widths divide without
    repeating key heads: a step waits for the memory of all devices, however few its tokens are. What is left goes to
    `fsdp` in training, which it makes lighter, and to `data` otherwise.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    left = n_devices
    if not training:
        keys = config.n_heads if config.latent else config.n_kv_heads
        hidden = config.hidden_dim if config.moe is None else math.gcd(config.hidden_dim, config.moe.expert_hidden_dim)
        common = math.gcd(config.n_heads, keys, hidden, config.vocab_size, left)
        sizes["tensor"] = max(t for t in range(1, min(common, LARGEST_TENSOR) + 1) if common % t == 0)
        left //= sizes["tensor"]
    if config.moe is not None:
        sizes["expert"] = math.gcd(left, config.moe.n_experts)
        left //= sizes["expert"]
    if training and config.dim % left == 0:
        sizes["fsdp"], left = left, 1
    sizes["data"] = left
    return sizes


def mesh_for(text: str, config: ModelConfig, *, training: bool = False) -> Mesh:
    """The mesh that `text` describes, over the devices that are there; "auto" is `default_sizes`."""
    return make_mesh(default_sizes(config, len(jax.devices()), training=training) if text == "auto" else text)
