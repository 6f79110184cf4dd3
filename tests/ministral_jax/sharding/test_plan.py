"""What a device of a mesh holds, planned, is what it holds when a model is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from ministral_jax.cache import allocate_cache, plan_cache
from ministral_jax.catalog import find
from ministral_jax.checkpoints.load import load_model
from ministral_jax.cli import main
from ministral_jax.errors import ShardingError
from ministral_jax.parameters import parameters
from ministral_jax.sharding.meshes import parse_mesh
from ministral_jax.sharding.plan import GIB, abstract_layout, parse_memory, plan_sharding
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.quantized_files import CASES, write_quantized_checkpoint


def held_by_devices(arrays) -> set[int]:
    """Bytes on each device, the distinct ones."""
    held: Counter[jax.Device] = Counter()
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=4,tensor=2", "data=2,context=4"])
def test_planned_bytes_are_those_of_a_loaded_model_and_its_cache(tmp_path, mesh):
    write_tiny_checkpoint(tmp_path, tiny_config())
    model = load_model(tmp_path, mesh=mesh)
    assert model.layout is not None
    sizes = {"length": 64, "chunk": 8, "page_size": 4}
    plan = plan_sharding(
        model.config, abstract_layout(model.config, parse_mesh(mesh)), dtype=jnp.float32, cache_dtype=jnp.float32,
        batch=4, **sizes,
    )  # fmt: skip
    assert held_by_devices(parameters(model).values()) == {plan.weight_bytes}
    float32, of_a_shard = jnp.dtype(jnp.float32), 4 // model.layout.ways("rows")
    cache = plan_cache(model.config, batch=of_a_shard, dtype=float32, layout=model.layout, **sizes)
    pools = allocate_cache(model.config, cache, float32, model.layout)
    assert held_by_devices(pool for pool in (*pools.keys, *pools.values) if pool is not None) == {plan.cache_bytes}


def test_a_quantised_model_is_planned_in_its_format(tmp_path):
    write_quantized_checkpoint(tmp_path, tiny_config(), "mistral", CASES[0])
    model = load_model(tmp_path, mesh="tensor=2", dtype="float32")
    layout = abstract_layout(model.config, parse_mesh("tensor=2"))
    plan = plan_sharding(model.config, layout, dtype=jnp.float32, length=16)
    assert held_by_devices(parameters(model).values()) == {plan.weight_bytes}


def test_published_models_fit_where_arithmetic_says_so():
    config = find("ministral-8b-instruct-2410").config
    plan = plan_sharding(config, abstract_layout(config, parse_mesh("tensor=8")), length=4096)
    matrices = 2 * (2 * config.vocab_size * config.dim + 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288))
    norms = 2 * (2 * 36 + 1) * config.dim
    assert plan.weight_bytes == matrices // 8 + norms
    assert plan.fits(16 * GIB)
    assert not plan.fits(2 * GIB)


@pytest.mark.parametrize(("text", "expected"), [("16GB", 16 * 10**9), ("80 GiB", 80 * GIB), ("v5e", 16 * GIB)])
def test_device_memory_is_read_from_text(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "16", "v99", "GB", "-1GB"])
def test_other_device_memory_is_refused_in_one_line(text):
    with pytest.raises(ShardingError, match="expected a size such as 16GB or one of v4") as caught:
        parse_memory(text)
    assert "\n" not in str(caught.value)


def test_inspect_shows_the_split_and_says_whether_it_fits(capsys):
    command = ["inspect", "ministral-8b-instruct-2410", "--mesh", "fsdp=4,tensor=2", "--context", "4096"]
    assert main([*command, "--device-memory", "v5e"]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.attention.wk.weight x 36" in shown
    assert "fits 16.00 GiB" in shown
    assert main([*command, "--device-memory", "1GB", "--json"]) == 0
    mesh = json.loads(capsys.readouterr().out)["mesh"]
    assert mesh["fits"] is False
    assert mesh["parameters"][0]["spec"] == "tensor fsdp"
    assert mesh["device_bytes"] == mesh["weight_bytes"] + mesh["cache_bytes"]


@pytest.mark.parametrize(
    ("mesh", "reason"),
    [("tensor=3", "does not divide the 32 query heads"), ("tensor=x", "cannot read"), ("fsdp=*", "give every size")],
)
def test_inspect_refuses_a_mesh_in_one_line(mesh, reason, capsys):
    assert main(["inspect", "ministral-8b-instruct-2410", "--mesh", mesh]) == 1
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1


def on_one_device(sizes: dict[str, int], *, expert: int, tensor: int) -> float:
    """Of tensors by what splits them."""
    return sizes["whole"] + sizes["tensor"] / tensor + sizes["experts"] / (expert * tensor)


@pytest.mark.parametrize(
    ("mesh", "expert", "tensor"),
    [("tensor=8", 1, 8), ("expert=2,tensor=8", 2, 8), ("expert=8,tensor=8", 8, 8), ("expert=64", 64, 1)],
)
def test_large_3_takes_of_a_device_what_its_published_tensors_say(mesh, expert, tensor):
    """Every tensor written out: FP8 with a float32 scale for each 128 x 128, but for those that no file quantises."""
    config = find("mistral-large-3-675b-instruct-2512").config

    def dense(*shape: int) -> int:
        return 2 * math.prod(shape)

    def fp8(rows: int, columns: int) -> int:
        return rows * columns + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)

    low_rank = dense(1536, 7168) + dense(576, 7168)
    norms = dense(7168) * (2 * 61 + 1) + 61 * (dense(1536) + dense(512))
    heads = fp8(24576, 1536) + fp8(32768, 512) + fp8(7168, 16384)
    tower = 48 * (4 * dense(1664, 1664) + 3 * dense(8192, 1664) + 2 * dense(1664)) + dense(1664, 3, 14, 14)
    tower += 2 * dense(1664) + dense(1664, 6656) + dense(7168, 1664) + dense(7168, 7168)
    sizes = {
        "whole": 61 * low_rank + norms + 58 * dense(128, 7168) + tower,
        "tensor": 61 * heads + 2 * dense(131072, 7168) + 3 * 3 * fp8(16384, 7168) + 58 * 3 * fp8(4096, 7168),
        "experts": 58 * 128 * 3 * fp8(4096, 7168),
    }
    plan = plan_sharding(config, abstract_layout(config, parse_mesh(mesh)), batch=64, length=8192, platform="gpu")
    assert plan.weight_bytes == on_one_device(sizes, expert=expert, tensor=tensor)
    sequences = 64 // expert
    assert plan.cache_bytes == 61 * (sequences * 8192 + 64) * 576 * 2


def test_a_tpu_keeps_latents_in_whole_rows_of_128_numbers():
    config = find("mistral-large-3-675b-instruct-2512").config
    layout = abstract_layout(config, parse_mesh("tensor=8"))
    on_gpu, on_tpu = (plan_sharding(config, layout, length=640, platform=name).cache_bytes for name in ("gpu", "tpu"))
    assert on_tpu * 576 == on_gpu * 640


@pytest.mark.parametrize(
    ("mesh", "chip", "verdict"),
    [
        ("tensor=8", "h200", "fits 141.00 GiB"),
        ("expert=2,tensor=8", "h200", "fits 141.00 GiB"),
        ("expert=8,tensor=8", "v6e", "fits 32.00 GiB"),
        ("expert=8", "v6e", "does not fit 32.00 GiB"),
        ("expert=2,tensor=8", "v6e", "does not fit 32.00 GiB"),
        ("expert=64", "v6e", "does not fit 32.00 GiB"),
        ("expert=4,tensor=8", "v6e", "does not fit 32.00 GiB: too little is left"),
    ],
)
def test_inspect_says_where_large_3_fits(mesh, chip, verdict, capsys):
    command = ["inspect", "mistral-large-3-675b-instruct-2512", "--context", "8192", "--batch", "8"]
    assert main([*command, "--mesh", mesh, "--device-memory", chip]) == 0
    assert f"on each device: {verdict}" in capsys.readouterr().out
