"""Context parallelism compiled for a v6e-8 that is not here: transfers are under way during kernels. Nothing is run."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ministral_jax.sharding.context import context_flash_attention

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

T, D, N, K, H = 65536, 4096, 32, 8, 128
SEQUENCE = PartitionSpec(None, "context")


def v6e_8() -> jax.sharding.Mesh:
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4")
    return jax.sharding.Mesh(topologies.make_mesh(described, (8,), ("context",)).devices, ("context",))


def compiled(function: Any, mesh: jax.sharding.Mesh, *shapes: tuple[int, ...]) -> jax.stages.Compiled:
    """`function` of bfloat16 arrays, those of three axes and more split along the second."""
    specs = [SEQUENCE if len(shape) > 2 else PartitionSpec() for shape in shapes]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return jax.jit(function, in_shardings=[NamedSharding(mesh, spec) for spec in specs]).lower(*arguments).compile()


def schedules(program: jax.stages.Compiled) -> list[list[str]]:
    """What each computation does, in order: its transfers started and done, and the kernels, loops and products."""
    found: list[list[str]] = []
    for line in (program.as_text() or "").splitlines():
        if re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            found.append([])
        called = re.search(r" (collective-permute-start|collective-permute-done|while|custom-call|fusion)\(", line)
        if called and (called[1] != "fusion" or "kind=kOutput" in line):
            found[-1].append("kernel" if "flash_attention" in line and called[1] == "custom-call" else called[1])
    return found


def busy_times(schedule: list[str], work: str) -> list[bool]:
    """For each time that transfers are under way: whether `work` is done meanwhile."""
    times, waiting = [], False
    for event in schedule:
        if event == "collective-permute-start" and not waiting:
            times.append(False)
        waiting = event == "collective-permute-start" or (waiting and event != "collective-permute-done")
        if waiting and event == work:
            times[-1] = True
    return times


def test_keys_of_a_ring_travel_while_kernels_run() -> None:
    mesh = v6e_8()
    attend = jax.shard_map(
        lambda q, k, v: context_flash_attention(q, k, v, axis_name="context", split="zigzag"),
        mesh=mesh,
        in_specs=(SEQUENCE,) * 3,
        out_specs=SEQUENCE,
        check_vma=False,
    )

    def gradients(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    program = compiled(gradients, mesh, (1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H))
    times = [busy_times(schedule, "while") + busy_times(schedule, "kernel") for schedule in schedules(program)]
    in_loops = [times_of for times_of in times[:-1] if times_of]
    assert len(in_loops) == 2  # forward and backward
    assert all(any(times_of) for times_of in in_loops), schedules(program)
    text = program.as_text() or ""
    assert not re.search(r"all-gather|all-reduce|all-to-all|reduce-scatter", text)
    memory: Any = program.memory_analysis()
    assert memory.temp_size_in_bytes < 8 * memory.argument_size_in_bytes


def test_a_halo_travels_while_queries_are_projected() -> None:
    mesh = v6e_8()

    def layer(x: Any, wq: Any, wk: Any, wv: Any) -> Any:
        q, k, v = (jnp.einsum("BTD,ND->BTN", x, w).reshape(1, x.shape[1], -1, H) for w in (wq, wk, wv))
        return context_flash_attention(q, k, v, axis_name="context", window=4096)

    whole = PartitionSpec()
    attend = jax.shard_map(
        layer, mesh=mesh, in_specs=(SEQUENCE, whole, whole, whole), out_specs=SEQUENCE, check_vma=False
    )
    program = compiled(attend, mesh, (1, T, D), (N * H, D), (K * H, D), (K * H, D))
    (times,) = [busy_times(schedule, "fusion") for schedule in schedules(program) if "kernel" in schedule]
    assert all(times), schedules(program)
    lines = (program.as_text() or "").splitlines()
    sent = [re.search(r"= \(bf16\[([\d,]+)\].* collective-permute-start\(", line) for line in lines]
    rows = [int(np.prod([int(size) for size in found[1].split(",")])) for found in sent if found]
    assert sum(rows) == 2 * 4095 * K * H
