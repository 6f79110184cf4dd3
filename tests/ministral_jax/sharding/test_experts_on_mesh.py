"""Experts over devices: eight simulated ones compute what one does, wherever the tokens lie."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ministral_jax.config import ModelConfig, MoEConfig
from ministral_jax.grouped_product import rows_per_block
from ministral_jax.moe import ExpertForm, MoE, route
from ministral_jax.parameters import fill, initialize, parameter_specs, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.quantization.encoding import encode
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import tiny_config

CLOSE = 1e-5
MOE = MoEConfig(n_experts=8, experts_per_token=3, expert_hidden_dim=256, n_shared_experts=1)
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}


def config(moe: MoEConfig = MOE) -> ModelConfig:
    return tiny_config(moe=moe, n_layers=2)


@functools.cache
def layer() -> MoE:
    return initialize(MoE(config(), jnp.float32), jax.random.key(0), std=0.2)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal((*shape, 64)).astype(np.float32)


def placed(module: Any, layout: Layout, arrays: dict[str, jax.Array]) -> Any:
    specs = parameter_specs(module)
    return fill(module, {name: jax.device_put(a, layout.placement(name, specs[name])) for name, a in arrays.items()})


def on_mesh(mesh: str, x: np.ndarray, module: MoE | None = None, arrays: dict[str, jax.Array] | None = None) -> Any:
    layout = layout_for(config(), make_mesh(mesh))
    if module is None:
        module = MoE(config(), jnp.float32)
    module.layout = layout
    graph, weights = nnx.split(placed(module, layout, arrays or parameters(layer())))
    axes = ("rows", None) if x.ndim == 2 else ("batch" if x.shape[0] % layout.ways("batch") == 0 else None, None, None)
    run = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x), compiler_options=QUICK)
    return np.asarray(run(weights, layout.put(x, *axes)))


@functools.cache
def alone(*shape: int) -> np.ndarray:
    return np.asarray(layer()(jnp.asarray(tokens(*shape))))


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ("expert=4,tensor=2", (16,)),  # packed tokens, four to a device, travel
        ("expert=8", (8,)),  # one token and one expert to a device
        ("data=2,expert=4", (4, 5)),  # fewer sequences than devices: nothing travels, answers are added
        ("data=2,expert=2,tensor=2", (4, 5)),  # a sequence to each of four devices
        ("fsdp=2,tensor=4", (16,)),  # experts whole on every device
    ],
)
def test_a_layer_on_a_mesh_is_the_layer_on_one_device(mesh: str, shape: tuple[int, ...]) -> None:
    expected = alone(*shape)
    assert np.abs(on_mesh(mesh, tokens(*shape)) - expected).max() <= CLOSE * np.ptp(expected)


def test_no_token_is_dropped_when_all_go_to_the_experts_of_one_device() -> None:
    """The worst case for buffers: every copy of every token arrives on the same device."""
    arrays = dict(parameters(layer()))
    gate = np.zeros((8, 64), np.float32)
    gate[:3] = 1.0
    x = np.abs(tokens(16))
    arrays["gate.weight"] = jnp.asarray(gate)
    expected = np.asarray(fill(layer(), arrays)(jnp.asarray(x)))
    found = on_mesh("expert=2,tensor=4", x, arrays=arrays)
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


def test_devices_multiply_the_tokens_that_were_routed_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted while it runs: blocks of rows of experts that got any, whatever room the buffers have."""
    of_one, rows_done = ExpertForm.of_one, []

    def counted(self: ExpertForm, trained: Any, frozen: Any, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: rows_done.append(len(x)))
        return of_one(self, trained, frozen, x)

    monkeypatch.setattr(ExpertForm, "of_one", counted)
    x = tokens(16)
    on_mesh("expert=4,tensor=2", x)
    jax.effects_barrier()
    block = rows_per_block(2 * 16, 2, "cpu")  # room for two copies of each token, on a device with two experts
    got = np.bincount(np.asarray(route(layer().gate(jnp.asarray(x)), MOE).experts).reshape(-1), minlength=8)
    assert got.sum() == 16 * MOE.experts_per_token
    assert rows_done.count(block) == len(rows_done) == 2 * int(np.ceil(got / block).sum())  # tensor=2: half of each


@pytest.mark.long
def test_tokens_travel_in_rounds_where_the_buffer_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ministral_jax.moe.MAX_BUFFER_BYTES", 4 * 64 * 24)  # rows for two tokens from each device
    expected = alone(16)
    assert np.abs(on_mesh("expert=4,tensor=2", tokens(16)) - expected).max() <= CLOSE * np.ptp(expected)


@pytest.mark.long
@pytest.mark.parametrize("stored", [LinearFormat("fp8_block"), LinearFormat("nvfp4")], ids=lambda s: s.format)
def test_quantised_experts_on_a_mesh_are_those_on_one_device(stored: LinearFormat) -> None:
    module, arrays = MoE(config(), jnp.float32), dict(parameters(layer()))
    for name in ("w1", "w2", "w3"):
        getattr(module.experts, name).store_as(stored)
        parts = [encode(matrix, stored) for matrix in arrays.pop(f"experts.{name}.weight")]
        for part in parts[0]:
            arrays[f"experts.{name}.{part}"] = jnp.stack([one[part] for one in parts])
    expected = np.asarray(fill(module, arrays)(jnp.asarray(tokens(16))))
    found = on_mesh("expert=4,tensor=2", tokens(16), module, arrays)
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


@pytest.mark.long
def test_gradients_through_the_exchange_are_those_of_one_device() -> None:
    layout = layout_for(config(), make_mesh("expert=4,tensor=2"))
    module = MoE(config(), jnp.float32, layout)
    x, pull = tokens(16), tokens(2, 8).reshape(16, 64)

    def gradients(module: MoE, x: Any) -> Any:
        graph, weights = nnx.split(module)
        loss = lambda weights, x: jnp.sum(nnx.merge(graph, weights)(x) * pull)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(weights, x)

    expected = gradients(layer(), jnp.asarray(x))
    found = gradients(placed(module, layout, parameters(layer())), layout.put(x, "rows", None))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=CLOSE * float(np.ptp(other)))


@pytest.mark.long
def test_a_model_of_experts_on_a_mesh_is_the_model_on_one_device() -> None:
    """Scoring with experts over four devices and heads over two."""
    cfg = dataclasses.replace(config(), max_length=32)
    model = initialize(Transformer(cfg), jax.random.key(1), std=0.2)
    layout = layout_for(cfg, make_mesh("expert=4,tensor=2"))
    spread = placed(Transformer(cfg, layout=layout), layout, parameters(model))
    ids = np.random.default_rng(0).integers(0, 128, (4, 12)).astype(np.int32)
    graph, weights = nnx.split(spread)
    found = jax.jit(lambda weights, ids: nnx.merge(graph, weights)(ids), compiler_options=QUICK)(
        weights, layout.put(ids, "batch", "sequence")
    )
    expected = np.asarray(model(jnp.asarray(ids)))
    assert np.abs(np.asarray(found) - expected).max() <= CLOSE * np.ptp(expected)
