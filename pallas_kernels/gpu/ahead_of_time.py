"""Compiles for a Hopper GPU that is not here: the CUDA plugin and the compiler wheels go down to machine code.

Nothing can be run, and nothing is tuned: XLA picks its own matrix products untimed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What the plugin would read from an H200; from the vendor's tables of compute capability 9.0.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class AbsentGpu(NamedTuple):
    """Where an absent H200's arrays would lie, and the mesh that tells kernels what they compile for."""

    sharding: jax.sharding.SingleDeviceSharding
    mesh: jax.sharding.AbstractMesh


def absent_gpu() -> AbsentGpu:
    """One H200, from the description above."""
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H200)
    kind = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return AbsentGpu(
        jax.sharding.SingleDeviceSharding(topology.devices[0]),
        jax.sharding.AbstractMesh((), (), abstract_device=kind),
    )


def absent_gpus(count: int, hosts: int = 1) -> list[Any]:
    """So many H200, as many on each host, to make a mesh of; with the compiler found for whoever compiles for them."""
    put_compiler_on_path()
    shape = f"1x{hosts}x{count // hosts}"
    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology=shape, target_config=H200)
    return list(topology.devices)


def compile_for_h200(function: Callable[..., Any], *arguments: Any, donate: Sequence[int] = ()) -> jax.stages.Compiled:
    """`function` compiled to machine code (sm_90a). Arguments are arrays or their shapes and dtypes."""
    put_compiler_on_path()
    gpu = absent_gpu()
    with jax.sharding.use_abstract_mesh(gpu.mesh):
        staged = jax.jit(function, in_shardings=gpu.sharding, out_shardings=gpu.sharding, donate_argnums=tuple(donate))
        return staged.lower(*arguments).compile()


def put_compiler_on_path() -> None:
    """XLA and Mosaic call the vendor's assembler by name. Raises RuntimeError where its wheels are not installed."""
    found = importlib.util.find_spec("nvidia")
    if found is None or found.submodule_search_locations is None:
        raise RuntimeError("the vendor's compiler wheels are missing: pip install '.[aot]'")
    folder = str(Path(next(iter(found.submodule_search_locations))) / "cu13" / "bin")
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
