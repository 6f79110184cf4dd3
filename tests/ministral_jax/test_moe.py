"""Mixture of experts: routing against the published formulas in float64, and the layer against a sum over experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ministral_jax import grouped_product as grouped_product_module
from ministral_jax import moe as moe_module
from ministral_jax.config import ModelConfig, MoEConfig
from ministral_jax.linear import LowRank
from ministral_jax.moe import MoE, group, route
from ministral_jax.parameters import fill, initialize, parameter_specs, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.quantization.encoding import encode
from pallas_kernels import grouped_matmul_fp8
from tests.checkpoint_files import tiny_config

from .paged_runner import QUICK, jitted

DIM, HIDDEN, TOKENS = 128, 256, 24
MIXTRAL = MoEConfig(n_experts=5, experts_per_token=2, expert_hidden_dim=HIDDEN)
LARGE_3 = MoEConfig(n_experts=20, experts_per_token=4, expert_hidden_dim=HIDDEN, n_shared_experts=1, routed_scale=1.5)
KINDS = pytest.mark.parametrize("moe", [MIXTRAL, LARGE_3], ids=["mixtral", "large_3"])
CLOSE = 1e-5


def config(moe: MoEConfig) -> ModelConfig:
    return tiny_config(dim=DIM, moe=moe)


@functools.cache
def layer(moe: MoEConfig) -> MoE:
    return initialize(MoE(config(moe), jnp.float32), jax.random.key(0), std=0.1)


def answer(module: MoE, x: np.ndarray) -> jax.Array:
    return jitted(module, lambda module, x: module(x))(jnp.asarray(x))


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TOKENS, DIM)).astype(np.float32)


def mixtral_weights(logits: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """mistral-inference: the largest logits, and a softmax over those alone. Zeros for experts that are not chosen."""
    weights = np.zeros(logits.shape)
    for row, out in zip(logits.astype(np.float64), weights, strict=True):
        chosen = np.argsort(-row)[: moe.experts_per_token]
        exponentials = np.exp(row[chosen] - row[chosen].max())
        out[chosen] = exponentials / exponentials.sum()
    return weights


def large_3_weights(logits: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """transformers' Mistral4: a softmax over all, the largest of it, divided by their sum, times the routed scale."""
    weights = np.zeros(logits.shape)
    for row, out in zip(logits.astype(np.float64), weights, strict=True):
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        chosen = np.argsort(-shares)[: moe.experts_per_token]
        out[chosen] = shares[chosen] / (shares[chosen].sum() + 1e-20) * moe.routed_scale
    return weights


FORMULAS = {MIXTRAL: mixtral_weights, LARGE_3: large_3_weights}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense_sum(module: MoE, x: np.ndarray, matrices: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """The layer in float64: every expert computes every token, and unchosen ones weigh nothing."""
    w = {name: np.asarray(array, np.float64) for name, array in (matrices or parameters(module)).items()}
    weights = FORMULAS[module.moe](x @ w["gate.weight"].T, module.moe)  # [T, E]
    up = np.einsum("td,efd->etf", x, w["experts.w3.weight"])
    hidden = silu(np.einsum("td,efd->etf", x, w["experts.w1.weight"])) * up
    out = np.einsum("te,etf,edf->td", weights, hidden, w["experts.w2.weight"])
    if module.shared_experts is not None:
        one, two, three = (w[f"shared_experts.{name}.weight"] for name in ("w1", "w2", "w3"))
        out += (silu(x @ one.T) * (x @ three.T)) @ two.T
    return out


def assert_close(found: Any, expected: np.ndarray, close: float = CLOSE) -> None:
    assert np.abs(np.asarray(found) - expected).max() <= close * np.ptp(expected)


@KINDS
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 1.0, 30.0]))
def test_routing_is_the_published_formula(moe: MoEConfig, seed: int, spread: float) -> None:
    logits = (spread * np.random.default_rng(seed).standard_normal((16, moe.n_experts))).astype(np.float32)
    routing = route(jnp.asarray(logits), moe)
    found = np.zeros(logits.shape)
    np.put_along_axis(found, np.asarray(routing.experts), np.asarray(routing.weights, np.float64), axis=-1)
    np.testing.assert_allclose(found, FORMULAS[moe](logits, moe), rtol=1e-5, atol=1e-7)


@KINDS
def test_the_layer_is_the_weighted_sum_over_experts(moe: MoEConfig) -> None:
    x = tokens()
    assert_close(answer(layer(moe), x), dense_sum(layer(moe), x))
    assert_close(answer(layer(moe), x[None]), dense_sum(layer(moe), x)[None])


@KINDS
def test_no_token_is_dropped_when_all_go_to_the_same_experts(moe: MoEConfig) -> None:
    x = np.repeat(tokens()[:1], TOKENS, axis=0) * np.linspace(0.5, 2, TOKENS)[:, None].astype(np.float32)
    assert_close(answer(layer(moe), x), dense_sum(layer(moe), x))


@KINDS
def test_one_token_alone_gets_the_same_answer(moe: MoEConfig) -> None:
    x = tokens()
    assert_close(answer(layer(moe), x[:1]), dense_sum(layer(moe), x)[:1])


def test_experts_that_nobody_chose_are_not_read() -> None:
    """Two tokens meet at most four of the five: NaN in the matrices of the others changes nothing."""
    x, module = tokens()[:2], layer(MIXTRAL)
    chosen = FORMULAS[MIXTRAL](x @ np.asarray(module.gate.weight[...]).T, MIXTRAL).any(axis=0)
    poison = np.where(chosen, 0, np.nan).astype(np.float32)[:, None, None]
    weights = {n: w + poison if n.startswith("experts") else w for n, w in parameters(module).items()}
    np.testing.assert_array_equal(answer(fill(module, weights), x), answer(module, x))


def test_the_router_is_float32_whatever_the_activations_are() -> None:
    """Two logits that bfloat16 would round to the same number still have an order."""
    module = layer(MIXTRAL)
    gate = np.zeros((5, DIM), np.float32)
    gate[:, 0] = 1.0
    gate[2, 1], gate[4, 1] = 2.0**-9, 2.0**-10
    module = fill(module, parameters(module) | {"gate.weight": jnp.asarray(gate)})
    logits = module.gate(jnp.ones((1, DIM), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert route(logits, MIXTRAL).experts.tolist() == [[2, 4]]


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), n_experts=st.integers(2, 40))
def test_groups_are_the_copies_of_tokens_by_expert(seed: int, n_experts: int) -> None:
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(n_experts)[:2] for _ in range(9)]).astype(np.int32)
    groups = group(jnp.asarray(experts), n_experts)
    copies = [(expert, token) for token, chosen in enumerate(experts) for expert in chosen]
    assert groups.tokens.tolist() == [token for _, token in sorted(copies)]
    assert groups.sizes.tolist() == np.bincount(experts.reshape(-1), minlength=n_experts).tolist()
    assert np.asarray(groups.tokens)[np.asarray(groups.rows)].tolist() == [[token] * 2 for token in range(9)]


@KINDS
def test_gradients_are_those_of_the_sum_over_experts(moe: MoEConfig) -> None:
    """Of inputs, router and experts; the formula in jax, every expert on every token."""
    graph, weights = nnx.split(layer(moe))
    x, pull = jnp.asarray(tokens()), jnp.asarray(tokens(1))

    def dense(weights: Any, x: Any) -> Any:
        module = nnx.merge(graph, weights)
        routing = route(module.gate(x), moe)
        share = jnp.zeros((TOKENS, moe.n_experts)).at[jnp.arange(TOKENS)[:, None], routing.experts].set(routing.weights)
        w1, w2, w3 = (getattr(module.experts, name).weight[...] for name in ("w1", "w2", "w3"))
        hidden = jax.nn.silu(jnp.einsum("td,efd->etf", x, w1)) * jnp.einsum("td,efd->etf", x, w3)
        out = jnp.einsum("te,etf,edf->td", share, hidden, w2)
        return jnp.sum((out if module.shared_experts is None else out + module.shared_experts(x)) * pull)

    def ours(weights: Any, x: Any) -> Any:
        return jnp.sum(nnx.merge(graph, weights)(x) * pull)

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1)), compiler_options=QUICK)(weights, x) for f in (ours, dense))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=CLOSE * float(np.ptp(other)))


@pytest.mark.parametrize(
    ("moe", "stored"),
    [
        (MIXTRAL, LinearFormat("fp8_block")),
        pytest.param(MIXTRAL, LinearFormat("int8_channel", "dynamic"), marks=pytest.mark.long),
        pytest.param(LARGE_3, LinearFormat("nvfp4"), marks=pytest.mark.long),
        pytest.param(LARGE_3, LinearFormat("fp8_block", "dynamic"), marks=pytest.mark.long),
    ],
    ids=lambda value: value.format if isinstance(value, LinearFormat) else str(value.n_experts),
)
def test_quantised_experts_compute_what_their_matrices_mean(moe: MoEConfig, stored: LinearFormat) -> None:
    """And parts of experts that nobody chose are not read: their scales are NaN."""
    x = tokens()[:2]
    dense = layer(moe)
    arrays, meant = dict(parameters(dense)), dict(parameters(dense))
    chosen = FORMULAS[moe](x @ np.asarray(dense.gate.weight[...]).T, moe).any(axis=0)
    module = MoE(config(moe), jnp.float32)
    for name in ("w1", "w2", "w3"):
        getattr(module.experts, name).store_as(stored)
        experts = arrays.pop(f"experts.{name}.weight")
        parts = [encode(matrix, stored) for matrix in experts]
        meant[f"experts.{name}.weight"] = jnp.stack([stored.weight(part).dequantize() for part in parts])
        for part in parts[0]:
            stack = jnp.stack([one[part] for one in parts])
            is_scale = part.endswith("scale") and stack.dtype == jnp.float32
            if is_scale:
                stack = jnp.where(chosen.reshape(-1, *[1] * (stack.ndim - 1)), stack, jnp.nan)
            arrays[f"experts.{name}.{part}"] = stack
    found = answer(fill(module, arrays), x)
    # Rounded activations are off by half a step of their grid, once for each of two products.
    assert_close(found, dense_sum(module, x, meant), CLOSE if stored.activations == "none" else 0.05)


@pytest.mark.parametrize("by_groups", [False, True], ids=["one expert after the other", "all at once"])
def test_an_adapter_of_every_expert_adds_its_product(by_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each matrix were `W + scale * B A`, and gradients reach A and B."""
    monkeypatch.setattr(moe_module, "has_grouped_kernel", lambda x, w: by_groups)
    base, moe, rank = layer(MIXTRAL), MIXTRAL, 3
    module = MoE(config(moe), jnp.float32)
    for name in ("w1", "w2", "w3"):
        getattr(module.experts, name).adapt(LowRank(rank, 2.0))
    rng = np.random.default_rng(0)
    specs = parameter_specs(module)
    drawn = {n: 0.1 * rng.standard_normal(s.shape).astype(np.float32) for n, s in specs.items() if "lora" in n}
    assert specs["experts.w1.lora_a"].axes == ("expert", "rank", "expert_embed")
    assert specs["experts.w1.lora_b"].shape == (5, HIDDEN, rank)
    module = fill(module, parameters(base) | {name: jnp.asarray(array) for name, array in drawn.items()})
    meant = dict(parameters(base))
    for name in ("w1", "w2", "w3"):
        change = np.einsum("eor,eri->eoi", drawn[f"experts.{name}.lora_b"], drawn[f"experts.{name}.lora_a"])
        meant[f"experts.{name}.weight"] = meant[f"experts.{name}.weight"] + 2.0 * change
    x = tokens()
    assert_close(answer(module, x), dense_sum(base, x, meant))


def plain_layer(arrays: dict[str, jax.Array], moe: MoEConfig, x: jax.Array, scale: float) -> jax.Array:
    """The layer as products of every token with every expert's `W + scale * B A`, unchosen ones times zero."""

    def matrix(name: str) -> jax.Array:
        a, b = (arrays[f"experts.{name}.lora_{letter}"] for letter in "ab")
        return arrays[f"experts.{name}.weight"] + scale * jnp.einsum("eor,eri->eoi", b, a)

    shares = jax.nn.softmax(x @ arrays["gate.weight"].T, axis=-1)
    least = jnp.sort(shares, axis=-1)[:, -moe.experts_per_token][:, None]
    chosen = jnp.where(shares >= least, shares, 0.0)
    weights = moe.routed_scale * chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    hidden = jax.nn.silu(jnp.einsum("td,efd->etf", x, matrix("w1"))) * jnp.einsum("td,efd->etf", x, matrix("w3"))
    out = jnp.einsum("te,etf,edf->td", weights, hidden, matrix("w2"))
    if moe.n_shared_experts:
        one, two, three = (arrays[f"shared_experts.{name}.weight"] for name in ("w1", "w2", "w3"))
        out += (jax.nn.silu(x @ one.T) * (x @ three.T)) @ two.T
    return out


@KINDS
@pytest.mark.parametrize(
    "stored", [None, pytest.param(LinearFormat("nf4"), marks=pytest.mark.long)], ids=["dense", "nf4"]
)
def test_gradients_of_adapters_of_experts_are_those_of_the_plain_formula(
    moe: MoEConfig, stored: LinearFormat | None
) -> None:
    """Of A and B of every expert, and of what came in; over a base of four bits as over one of floats."""
    base, module, scale = parameters(layer(moe)), MoE(config(moe), jnp.float32), 1.5
    held = dict(base)
    for name in ("w1", "w2", "w3"):
        linear = getattr(module.experts, name)
        linear.adapt(LowRank(3, scale))
        if stored is None:
            continue
        linear.store_as(stored)
        weight = f"experts.{name}.weight"
        parts = [encode(matrix, stored) for matrix in held.pop(weight)]
        base[weight] = jnp.stack([stored.weight(part).dequantize() for part in parts])
        held |= {f"experts.{name}.{part}": jnp.stack([one[part] for one in parts]) for part in parts[0]}
    rng = np.random.default_rng(1)
    specs = parameter_specs(module)
    lora = {n: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32) for n, s in specs.items() if s.adapter}
    x, direction = jnp.asarray(tokens()), jnp.asarray(tokens(1))
    graph, _ = nnx.split(module)

    def ours(lora: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(direction * fill(nnx.merge(graph, nnx.split(module)[1]), held | lora)(x))

    def plain(lora: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(direction * plain_layer(base | lora, moe, x, scale))

    found, expected = (jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)(lora, x) for loss in (ours, plain))
    assert found[0].keys() == expected[0].keys()
    assert len(found[0]) == 6
    for name, gradient in expected[0].items():
        assert_close(found[0][name], np.asarray(gradient))
    assert_close(found[1], np.asarray(expected[1]))


def test_experts_in_fp8_blocks_are_taken_all_at_once_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition stands in the kernel's place. Activations are rounded twice, by half a step of e4m3."""
    stored = LinearFormat("fp8_block", "dynamic")
    dense, module = layer(MIXTRAL), MoE(config(MIXTRAL), jnp.bfloat16)
    arrays, meant = ({n: a for n, a in parameters(dense).items() if "experts" not in n} for _ in range(2))
    for name in ("w1", "w2", "w3"):
        getattr(module.experts, name).store_as(stored)
        parts = [encode(matrix, stored) for matrix in parameters(dense)[f"experts.{name}.weight"]]
        meant[f"experts.{name}.weight"] = jnp.stack([stored.weight(part).dequantize() for part in parts])
        arrays |= {f"experts.{name}.{part}": jnp.stack([one[part] for one in parts]) for part in parts[0]}
    calls = []

    def definition(*operands: Any) -> jax.Array:
        calls.append(operands)
        return grouped_matmul_fp8(*operands, implementation="reference")

    monkeypatch.setattr(moe_module, "has_grouped_fp8_kernel", lambda w: True)
    monkeypatch.setattr(grouped_product_module, "grouped_matmul_fp8", definition)
    x = jnp.asarray(tokens(), jnp.bfloat16)
    specs = parameter_specs(module)
    module = fill(module, {name: array.astype(specs[name].dtype) for name, array in arrays.items()})
    found = np.asarray(answer(module, x), np.float32)
    assert len(calls) == 3
    assert_close(found, dense_sum(dense, np.asarray(x, np.float64), meant), 0.05)
