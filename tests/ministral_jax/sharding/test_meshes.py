"""Meshes from text and from a model."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest
from jax.sharding import AxisType

from ministral_jax.catalog import MODELS
from ministral_jax.errors import ShardingError
from ministral_jax.sharding.layout import require_heads_divide
from ministral_jax.sharding.meshes import REST, default_sizes, make_mesh, parse_mesh, show_mesh, with_rest
from ministral_jax.sharding.rules import MESH_AXES


def test_text_is_read_and_written():
    sizes = parse_mesh("fsdp=4, tensor=2")
    assert sizes == {"data": 1, "fsdp": 4, "context": 1, "expert": 1, "tensor": 2}
    assert show_mesh(sizes) == "fsdp=4,tensor=2"
    assert show_mesh(parse_mesh("data=1")) == "data=1"


@pytest.mark.parametrize(
    "text", ["", "tensor", "tensor=", "tensor=0", "tensor=00", "tensor=-2", "tensor=2,tensor=2", "model=2", "tensor=2,",
             "fsdp=*,data=*", "tensor=1e3", "tensor=2;fsdp=2", "=2", "tensor=99999999"],
)  # fmt: skip
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(ShardingError) as caught:
        parse_mesh(text)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_star_takes_the_devices_that_are_left():
    sizes = parse_mesh("fsdp=*,tensor=2")
    assert sizes["fsdp"] == REST
    assert with_rest(sizes, 8)["fsdp"] == 4
    with pytest.raises(ShardingError, match="7 devices do not divide by the 2"):
        with_rest(sizes, 7)


def test_a_mesh_has_all_axes_with_automatic_types():
    mesh = make_mesh("fsdp=*,tensor=2")
    assert tuple(mesh.shape.items()) == (("data", 1), ("fsdp", 4), ("context", 1), ("expert", 1), ("tensor", 2))
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert set(mesh.devices.flat) == set(jax.devices())


def test_fewer_devices_than_there_are_will_do_and_more_will_not():
    assert make_mesh("tensor=2").size == 2
    with pytest.raises(ShardingError, match="tensor=16 takes 16 devices: there are 8"):
        make_mesh("tensor=16")


class Slice:
    """What the mesh utilities ask of a device of one of several TPU slices."""

    def __init__(self, number: int, of_slice: int) -> None:
        self.id, self.slice_index, self.process_index = number, of_slice, 0
        self.platform, self.device_kind = "cpu", "cpu"


def test_outer_axes_go_between_slices():
    devices = [Slice(i, i // 4) for i in range(8)]
    mesh = make_mesh("data=2,tensor=4", devices)
    slices = [[device.slice_index for device in row] for row in mesh.devices.reshape(2, 4)]
    assert slices == [[0] * 4, [1] * 4]
    with pytest.raises(ShardingError, match="does not divide over the slices"):
        make_mesh("data=3", [Slice(i, i // 2) for i in range(4)])


@pytest.mark.parametrize("n_devices", [1, 4, 6, 8, 16, 64])
@pytest.mark.parametrize("training", [False, True])
def test_a_default_mesh_takes_all_devices_and_fits_every_published_model(n_devices, training):
    for entry in MODELS:
        sizes = default_sizes(entry.config, n_devices, training=training)
        assert math.prod(sizes.values()) == n_devices
        assert tuple(sizes) == MESH_AXES
        require_heads_divide(entry.config, sizes["tensor"])
        assert entry.config.latent or entry.config.n_kv_heads % sizes["tensor"] == 0


def test_defaults_for_the_usual_machines():
    config = next(entry.config for entry in MODELS if entry.name == "ministral-8b-instruct-2410")
    assert show_mesh(default_sizes(config, 8)) == "tensor=8"
    assert show_mesh(default_sizes(config, 8, training=True)) == "fsdp=8"
    large = next(entry.config for entry in MODELS if entry.config.latent)
    assert default_sizes(large, 64)["expert"] > 1
    narrow = dataclasses.replace(large, moe=dataclasses.replace(large.moe, expert_hidden_dim=1404))
    assert default_sizes(narrow, 8)["tensor"] == 4  # 8 would cut an expert's width unevenly
