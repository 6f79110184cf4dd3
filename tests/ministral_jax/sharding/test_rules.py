"""The table from logical axes to mesh axes: what it splits, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from jax.sharding import PartitionSpec as P

from ministral_jax.catalog import MODELS
from ministral_jax.config import ModelConfig
from ministral_jax.errors import ShardingError
from ministral_jax.parameters import parameter_specs
from ministral_jax.sharding.meshes import parse_mesh
from ministral_jax.sharding.plan import abstract_layout
from ministral_jax.sharding.rules import LOGICAL_AXES, MESH_AXES, RULES, Rules, fitting, partition
from ministral_jax.transformer import Transformer


def refusal(call) -> str:
    with pytest.raises(ShardingError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rules", "axes", "expected"),
    [
        ("tensor", ("heads", "embed"), P("tensor")),
        ("tensor", ("embed", "hidden"), P(None, "tensor")),
        ("fsdp", ("heads", "embed"), P(None, "fsdp")),
        ("fsdp+tensor", ("vocab", "embed"), P("tensor", "fsdp")),
        ("fsdp+tensor", ("batch", "sequence", "act_embed"), P(("data", "fsdp"))),
        ("data", ("heads", "embed"), P()),
        ("data", ("batch", "sequence", "act_vocab"), P("data")),
        ("expert", ("expert", "hidden", "expert_embed"), P("expert", "tensor", "fsdp")),
        ("context", ("batch", "sequence", "act_heads", None), P(("data", "fsdp"), "context", "tensor")),
        ("context", ("split_pages", None, "act_kv_heads", None), P(("data", "fsdp", "context"), None, "tensor")),
        ("all", ("layers", "heads", "embed"), P(None, "tensor", ("fsdp", "context"))),
        ("all", ("norm",), P()),
    ],
)
def test_an_array_is_split_as_its_axes_say(rules, axes, expected):
    assert partition(axes, RULES[rules], dict.fromkeys(MESH_AXES, 2)) == expected


def test_mesh_axes_of_size_one_split_nothing():
    assert partition(("heads", "embed"), RULES["all"], parse_mesh("tensor=2")) == P("tensor")
    assert partition(("heads", "embed"), RULES["all"], dict.fromkeys(MESH_AXES, 1)) == P()


def test_one_mesh_axis_on_two_dimensions_is_refused():
    colliding = Rules.of("colliding", {"heads": ("tensor",), "embed": ("tensor",)})
    message = refusal(lambda: partition(("heads", "embed"), colliding, parse_mesh("tensor=2"), name="wq"))
    assert message.startswith("wq: rules 'colliding' put mesh axis 'tensor' on both 'heads' and 'embed'")


def test_a_dimension_that_does_not_divide_is_refused_with_sizes_that_do():
    message = refusal(lambda: partition(("heads",), RULES["all"], parse_mesh("tensor=5"), shape=(12,), name="wq"))
    assert message == "wq: 'heads' of size 12 does not divide over tensor=5; sizes that do: 1, 2, 3, 4, 6, 12"


def test_unknown_axes_are_refused():
    assert "no logical axis 'head'" in refusal(lambda: Rules.of("mine", {"head": ("tensor",)}))
    assert "goes along 'model'" in refusal(lambda: Rules.of("mine", {"heads": ("model",)}))
    assert "no logical axis 'head'" in refusal(lambda: partition(("head",), RULES["all"], parse_mesh("tensor=2")))


def test_fitting_sizes_divide_all_counts():
    assert fitting(32, 8) == "1, 2, 4, 8"


def test_no_published_model_has_a_parameter_on_which_the_rules_collide():
    """Every axis of every parameter is known to the table, and no mesh axis splits two dimensions."""
    seen = set()
    for config in {entry.config.dim: entry.config for entry in MODELS}.values():
        for name, spec in parameter_specs(Transformer(two_layers_of(config))).items():
            for rules in RULES.values():
                partition(spec.axes, rules, dict.fromkeys(MESH_AXES, 2), name=name)
            seen.update(spec.axes)
    assert seen <= set(LOGICAL_AXES)
    assert {"vocab", "embed", "heads", "kv_heads", "hidden", "expert", "norm"} <= seen


def two_layers_of(config: ModelConfig) -> ModelConfig:
    """The first layers: of a mixture of experts, the last dense one and the first that is not."""
    moe = config.moe and dataclasses.replace(config.moe, first_dense_layers=min(config.moe.first_dense_layers, 1))
    return dataclasses.replace(config, n_layers=2, windows=config.windows[:2], moe=moe)


@pytest.mark.parametrize(
    ("mesh", "reason"),
    [
        ("tensor=3", "tensor=3 does not divide the 32 query heads; sizes that do: 1, 2, 4, 8, 16, 32"),
        ("tensor=64", "tensor=64 does not divide the 32 query heads"),
        ("context=2", "mesh axis context=2: rules 'tensor' split nothing along it; they use tensor"),
    ],
)
def test_heads_that_do_not_divide_are_refused(mesh, reason):
    config = next(entry.config for entry in MODELS if entry.name == "ministral-8b-instruct-2410")
    assert refusal(lambda: abstract_layout(config, parse_mesh(mesh), "tensor")).startswith(reason)


def test_fewer_key_heads_than_devices_are_repeated_and_that_is_said(caplog):
    config = next(entry.config for entry in MODELS if entry.name == "ministral-8b-instruct-2410")
    abstract_layout(config, parse_mesh("tensor=16"))
    assert "8 key heads on tensor=16: each is kept by 2 devices" in caplog.text
    caplog.clear()
    abstract_layout(config, parse_mesh("tensor=8"))
    assert not caplog.text
