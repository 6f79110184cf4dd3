"""What TPUs and Hopper GPUs would compute for a mixture of experts, counted by their compilers. Nothing is run."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ministral_jax.config import ModelConfig, MoEConfig
from ministral_jax.moe import MoE
from ministral_jax.parameters import parameter_specs
from ministral_jax.sharding.layout import layout_for
from ministral_jax.sharding.rules import MESH_AXES
from tests.checkpoint_files import tiny_config

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

DIM, HIDDEN, CHOSEN = 512, 1024, 2


def config(n_experts: int) -> ModelConfig:
    moe = MoEConfig(n_experts=n_experts, experts_per_token=CHOSEN, expert_hidden_dim=HIDDEN)
    return tiny_config(dim=DIM, moe=moe)


def run(graph: Any, weights: Any, x: Any) -> Any:
    return nnx.merge(graph, weights)(x)


@functools.cache
def compiled(n_experts: int, tokens: int) -> Any:
    from pallas_kernels.tpu.ahead_of_time import compile_for

    graph, weights = nnx.split(MoE(config(n_experts), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((tokens, DIM), jnp.bfloat16)
    return compile_for("v6e", functools.partial(run, graph), weights, x)


@pytest.mark.parametrize("tokens", [8, 1024])
def test_the_operations_are_those_of_the_routed_tokens_however_many_experts_there_are(tokens: int) -> None:
    products = 3 * 2 * tokens * CHOSEN * DIM * HIDDEN
    for n_experts in (8, 64):
        router = 2 * tokens * DIM * n_experts
        operations = compiled(n_experts, tokens).cost_analysis()["flops"]
        assert products <= operations < 1.3 * (products + 6 * router) + 5e6


def test_no_expert_is_copied_on_its_way_to_the_product() -> None:
    """Temporaries are less than one of the three matrices of one expert, of 64."""
    memory = compiled(64, 8).memory_analysis()
    assert memory.argument_size_in_bytes > 64 * 3 * 2 * DIM * HIDDEN
    assert memory.temp_size_in_bytes < 2 * DIM * HIDDEN


def test_tokens_travel_between_chips_by_a_ragged_exchange() -> None:
    """Eight chips, experts over four and their width over two: exact counts on the wire, no gathered experts."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    sizes = {"expert": 4, "tensor": 2}
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), MESH_AXES)
    kind = jax.sharding.AbstractDevice(device_kind=devices[0].device_kind, num_cores=1, platform="tpu")
    layout = layout_for(config(8), mesh)
    module = MoE(config(8), jnp.bfloat16, layout)
    graph, weights = nnx.split(module)
    specs = parameter_specs(module)
    placed = {name: layout.placement(name, spec) for name, spec in specs.items()}
    flat = [
        (path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[".".join(map(str, path))])))
        for path, leaf in nnx.to_flat_state(weights)
    ]
    x = jax.ShapeDtypeStruct((64, DIM), jnp.bfloat16, sharding=layout.sharding(("rows", None)))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        lowered = jax.jit(functools.partial(run, graph)).lower(nnx.from_flat_state(flat), x)
        text = lowered.compile().as_text() or ""
    assert "ragged-all-to-all" in text
    experts = f"bf16[8,{HIDDEN},{DIM}]"
    assert experts not in text


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11")
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA plugin is missing")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["the kernel", "the loop"])
def test_a_hopper_gpu_takes_a_projection_of_all_experts_in_one_kernel(dtype: Any) -> None:
    """Three kernels without a copy of an expert; for float32, which has no kernel, a loop over blocks."""
    from pallas_kernels.gpu.ahead_of_time import compile_for_h200

    graph, weights = nnx.split(MoE(config(64), dtype))
    found = compile_for_h200(functools.partial(run, graph), weights, jax.ShapeDtypeStruct((8, DIM), dtype))
    text = found.as_text() or ""
    kernels, loops = text.count('custom_call_target="mosaic_gpu_v2"'), text.count(" while(")
    assert (kernels, loops > 0) == ((3, False) if dtype == jnp.bfloat16 else (0, True))
    assert found.memory_analysis().temp_size_in_bytes < 3 * dtype.dtype.itemsize * DIM * HIDDEN
