"""Adapters on projections: what they add, where they go, how they begin, dropout, and the model without them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ministral_jax.errors import ConfigError, MinistralError
from ministral_jax.feed_forward import FeedForward
from ministral_jax.linear import Linear, LowRank, projections
from ministral_jax.lora import (
    PROJECTIONS,
    LoraConfig,
    adapted,
    adapter_parameters,
    attach,
    hf_module,
    initialize_adapters,
    set_dropout_keys,
    without_adapters,
)
from ministral_jax.parameters import AdapterParam, fill, initialize, parameter_specs, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.stacked import StackedTransformer
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import tiny_config
from tests.quantized_files import CASES, encode, values

OUT, IN, RANK = 48, 64, 4
SCALE = 1.75
TOKENS = jnp.arange(14)[None] * 7 % 128
# The formats once each, activations as they are: rounding those is judged in the tests of the formats.
FORMATS = [case for case in CASES if case[2] in ("compressed", "double")]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def abstract(kind="mistral_window"):
    return Transformer(tiny_config(kind, n_layers=2))


def filled(model):
    """The model with wide random values, adapters among them, B as well."""
    random = np.random.default_rng(3)
    return fill(model, lambda name, spec: jnp.asarray(0.3 * random.standard_normal(spec.shape), spec.dtype))


class Small(nnx.Module):
    """Two feed-forwards in a row, in the places of a decoder: all that an adapter needs to be seen at work."""

    def __init__(self):
        self.layers = nnx.List([nnx.Dict(feed_forward=FeedForward(IN, OUT, jnp.float32)) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer.feed_forward(x)
        return x


X = jnp.asarray(np.random.default_rng(8).standard_normal((5, IN)), jnp.float32)


def small(config=None):
    model = Small()
    if config is not None:
        attach(model, config)
    return filled(model)


WIDE = LoraConfig(rank=RANK, scaling=SCALE)


def projection(stored=None, dtype=jnp.float32, dropout=0.0):
    linear = Linear(OUT, IN, ("hidden", "embed"), dtype)
    if stored is not None:
        linear.store_as(stored)
    linear.adapt(LowRank(RANK, SCALE, dropout))
    return linear


@pytest.mark.parametrize("case", [None, *FORMATS], ids=lambda case: "dense" if case is None else "-".join(case))
def test_an_adapter_adds_its_scaled_product_to_a_weight_of_any_format(case):
    weight, a, b, x = drawn(OUT, IN), drawn(RANK, IN, seed=1), drawn(OUT, RANK, seed=2), drawn(5, IN, seed=3)
    stored, arrays, meant = None, {"weight": weight}, weight.astype(np.float64)
    if case is not None:
        name, _, spelling = case
        stored = LinearFormat(name, "none", spelling == "double")
        arrays = encode(weight, name, "none", spelling)
        meant = values(arrays, name)
    linear = projection(stored)
    arrays = {
        name: jnp.asarray(array.reshape(spec.shape), spec.dtype)
        for name, array in ({**arrays, "lora_a": a, "lora_b": b}).items()
        for spec in [parameter_specs(linear)[name]]
    }
    found = fill(linear, arrays)(jnp.asarray(x))
    wide = [part.astype(np.float64) for part in (x, a, b)]
    expected = wide[0] @ meant.T + SCALE * (wide[0] @ wide[1].T) @ wide[2].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.ptp(expected))


def test_in_bfloat16_each_product_and_the_sum_are_rounded_once():
    parts = {"weight": drawn(OUT, IN), "lora_a": drawn(RANK, IN, seed=1), "lora_b": drawn(OUT, RANK, seed=2)}
    x = jnp.asarray(drawn(5, IN, seed=3), jnp.bfloat16)
    linear = projection(dtype=jnp.bfloat16)
    assert parameter_specs(linear)["lora_a"].dtype == jnp.float32
    specs = parameter_specs(linear)
    found = fill(linear, {name: jnp.asarray(parts[name], specs[name].dtype) for name in specs})(x)
    assert found.dtype == jnp.bfloat16

    def rounded(array):
        return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)

    weight, a, b = map(rounded, parts.values())
    base = rounded(np.asarray(x, np.float64) @ weight.T)
    low = rounded(rounded(SCALE * np.asarray(x, np.float64) @ a.T) @ b.T)
    np.testing.assert_allclose(np.asarray(found, np.float64), base + low, rtol=2**-8, atol=0.02)


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    """Over more tokens than bfloat16 can count, each adding as much."""
    x, linear = jnp.ones((2, 512, IN), jnp.bfloat16), projection(dtype=jnp.bfloat16)
    linear = fill(linear, lambda name, spec: jnp.full(spec.shape, 2.0**-4 * (name != "weight"), spec.dtype))
    graph, adapters, rest = nnx.split(linear, AdapterParam, ...)
    found = by_name(jax.grad(lambda part: jnp.sum(nnx.merge(graph, part, rest)(x).astype(jnp.float32)))(adapters))
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(found["lora_b"], np.full((OUT, RANK), 1024 * SCALE * IN / 16))
    np.testing.assert_array_equal(found["lora_a"], np.full((RANK, IN), 1024 * SCALE * OUT / 16))


def test_new_adapters_change_nothing_and_begin_as_kaiming_uniform():
    model = small()
    before = np.asarray(model(X))
    attach(model, LoraConfig(rank=RANK))
    initialize_adapters(model, jax.random.key(5))
    np.testing.assert_array_equal(model(X), before)
    for linear in adapted(model).values():
        a, bound = np.asarray(linear.lora_a[...]), linear.shape[1] ** -0.5
        assert not np.any(np.asarray(linear.lora_b[...]))
        assert a.shape == (RANK, linear.shape[1])
        assert 0.9 * bound < np.abs(a).max() <= bound
        assert np.isclose(a.std(), bound / 3**0.5, rtol=0.15)
    again = small()
    attach(again, LoraConfig(rank=RANK, targets=("w2",)))
    initialize_adapters(again, jax.random.key(5))
    for name, array in adapter_parameters(again).items():  # by its own name, whatever else there is
        np.testing.assert_array_equal(array, adapter_parameters(model)[name])
    drawn_a = [np.asarray(linear.lora_a[...]).tobytes() for linear in adapted(model).values()]
    assert len(set(drawn_a)) == len(drawn_a) == 6


def test_a_whole_model_is_drawn_with_its_adapters():
    model = Small()
    attach(model, LoraConfig(rank=RANK))
    drawn_now = parameters(initialize(model, jax.random.key(0)))
    assert not np.any(np.asarray(drawn_now["layers.0.feed_forward.w1.lora_b"]))
    assert np.any(np.asarray(drawn_now["layers.0.feed_forward.w1.lora_a"]))


def test_adapters_are_parameters_of_their_own_kind_with_axes():
    model = abstract()
    attach(model, LoraConfig(rank=RANK))
    specs = parameter_specs(model)
    assert specs["layers.1.attention.wk.lora_a"].axes == ("rank", "embed")
    assert specs["layers.1.attention.wk.lora_b"].axes == ("kv_heads", "rank")
    assert specs["layers.1.feed_forward.w2.lora_a"].axes == ("rank", "hidden")
    trained = {name for name, spec in specs.items() if spec.adapter}
    assert trained == {f"{name}.{part}" for name in projections(model) for part in ("lora_a", "lora_b")}
    kinds = {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(model, AdapterParam))}
    assert kinds == {AdapterParam}
    assert len(nnx.to_flat_state(nnx.state(model, AdapterParam))) == len(trained) == 28


@pytest.mark.parametrize("targets", [("wq",), ("q_proj", "w2", "up_proj"), PROJECTIONS])
def test_only_what_is_targeted_is_adapted(targets):
    model = abstract()
    attach(model, LoraConfig(targets=targets))
    ours = {"q_proj": "wq", "up_proj": "w3"}
    assert {name.rsplit(".", 1)[1] for name in adapted(model)} == {ours.get(target, target) for target in targets}


def test_modules_of_the_same_names_outside_the_decoder_are_left_alone():
    class WithTower(nnx.Module):
        def __init__(self):
            self.vision_encoder = abstract()
            self.layers = abstract().layers

    model = WithTower()
    attach(model, LoraConfig())
    assert adapted(model)
    assert all(name.startswith("layers.") for name in adapted(model))


@pytest.mark.parametrize(
    ("fields", "module", "rank", "scale"),
    [
        ({}, "layers.0.attention.wq", 16, 2.0),
        ({"rank": 8, "scaling": 3.0}, "layers.0.attention.wq", 8, 3.0),
        ({"rank": 8, "alpha": 4.0}, "layers.0.attention.wq", 8, 0.5),
        ({"rank": 16, "alpha": 4.0, "rslora": True}, "layers.0.attention.wq", 16, 1.0),
        ({"rank_pattern": {"wq": 4}}, "layers.0.attention.wq", 4, 2.0),
        ({"rank_pattern": {"wq": 4}}, "layers.0.attention.wk", 16, 2.0),
        ({"rank_pattern": {"q_proj": 4}, "alpha": 8.0}, "layers.0.attention.wq", 4, 2.0),
        ({"rank_pattern": {"layers.1.*": 4}}, "layers.11.attention.wq", 4, 2.0),  # as in PEFT, a dot is any character
        ({"rank_pattern": {r"layers\.1\..*": 4}}, "layers.1.attention.wq", 4, 2.0),
        ({"rank_pattern": {"w1": 2, "feed_forward.*": 4}}, "layers.3.feed_forward.w1", 2, 2.0),
        ({"rank_pattern": {"^layers.3.feed_forward.w1": 5}}, "layers.3.feed_forward.w1", 5, 2.0),
        ({"rank_pattern": {"(wq|wv)": 2, "mlp.down_proj": 3}}, "layers.3.feed_forward.w2", 3, 2.0),
        ({"alpha": 16.0, "alpha_pattern": {"w[kq]": 8.0}}, "layers.0.attention.wk", 16, 0.5),
        ({"alpha": 16.0, "alpha_pattern": {"k": 8.0}}, "layers.0.attention.wk", 16, 1.0),
    ],
)  # fmt: skip
def test_rank_and_factor_of_a_module(fields, module, rank, scale):
    assert LoraConfig(**fields).adapter_of(module) == LowRank(rank, scale)


def test_modules_are_known_by_their_names_in_transformers():
    assert hf_module("layers.7.feed_forward.w3") == "model.layers.7.mlp.up_proj"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"targets": ("wq", "lm_head")}, "targets: found 'lm_head'"), ({"targets": ()}, "targets: found none"),
        ({"rank": 0}, "rank=0"), ({"rank": True}, "rank=True"), ({"alpha": 0.0}, "alpha=0"),
        ({"scaling": float("nan")}, "scaling=nan"), ({"dropout": 1.0}, "dropout=1"), ({"dropout": -0.1}, "dropout=-0"),
        ({"alpha": 8.0, "scaling": 2.0}, "scaling=2.0: alpha=8.0"), ({"rslora": True}, "rslora"),
        ({"alpha_pattern": {"wq": 1.0}}, "alpha_pattern"), ({"rank_pattern": {"wq": 0}}, r"rank_pattern\['wq'\]=0"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '\\(' is not"),
        ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern: .* repeats too much"),
        ({"alpha": 1.0, "alpha_pattern": {"wq": -1.0}}, r"alpha_pattern\['wq'\]=-1"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named(fields, named):
    with pytest.raises(ConfigError, match=rf"lora\.{named}") as caught:
        LoraConfig(**fields)
    assert "\n" not in str(caught.value)


def test_a_second_adapter_and_an_absent_target_are_refused():
    model = abstract()
    attach(model, LoraConfig(targets=("wq",)))
    with pytest.raises(MinistralError, match="has an adapter already"):
        attach(model, LoraConfig())
    bare = Linear(OUT, IN, ("hidden", "embed"), jnp.float32)

    class Latent(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Dict(attention=nnx.Dict(wo=bare))])

    with pytest.raises(ConfigError, match="'wq' is no projection of this model; it has wo"):
        attach(Latent(), LoraConfig(targets=("wq", "wo")))
    latent = Latent()
    attach(latent, LoraConfig())
    assert list(adapted(latent)) == ["layers.0.attention.wo"]


def test_without_adapters_is_the_base_around_the_same_arrays():
    model = small(WIDE)
    changed = np.asarray(model(X))
    bare = without_adapters(model)
    weights = {name: array for name, array in parameters(model).items() if "lora" not in name}
    before = np.asarray(fill(Small(), weights)(X))
    assert np.abs(changed - before).max() > 0.1 * np.ptp(before)
    np.testing.assert_array_equal(bare(X), before)
    np.testing.assert_array_equal(model(X), changed)
    assert parameters(bare).keys() == weights.keys()
    assert all(array is weights[name] for name, array in parameters(bare).items())
    graph, state = nnx.split(model)
    traced = jax.jit(lambda state: without_adapters(nnx.merge(graph, state))(X))(state)
    np.testing.assert_allclose(traced, before, rtol=0, atol=1e-5 * np.ptp(before))


def by_name(state):
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def test_gradients_are_those_of_the_sum_of_both_products():
    model, direction = small(WIDE), jnp.asarray(drawn(5, IN, seed=9))
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    found = by_name(jax.grad(lambda part: jnp.sum(direction * nnx.merge(graph, part, rest)(X)))(adapters))
    merged = without_adapters(model)
    for name, linear in adapted(model).items():
        total = linear.weight[...] + SCALE * linear.lora_b[...] @ linear.lora_a[...]
        projections(merged)[name].weight = linear.weight.replace(total)
    graph, weights = nnx.split(merged)
    dense = by_name(jax.grad(lambda weights: jnp.sum(direction * nnx.merge(graph, weights)(X)))(weights))
    assert len(found) == 12
    for name, linear in adapted(model).items():
        gradient = dense[f"{name}.weight"]
        for part, expected in (
            ("lora_b", SCALE * gradient @ linear.lora_a[...].T),
            ("lora_a", SCALE * linear.lora_b[...].T @ gradient),
        ):
            np.testing.assert_allclose(found[f"{name}.{part}"], expected, rtol=0, atol=2e-5 * np.ptp(expected))


ROUNDED = [case for case in CASES if case[1] != "none" and case[2] == "compressed" and case[0] != "fp8_channel"]


@pytest.mark.parametrize("case", ROUNDED, ids="-".join)
def test_gradients_pass_the_rounding_of_activations_by(case):
    """What reaches the layers below is `d_out W`, whatever the activations were rounded to."""
    name, activations, spelling = case
    weight = drawn(OUT, IN)
    arrays = encode(weight, name, activations, spelling)
    linear = Linear(OUT, IN, ("hidden", "embed"), jnp.float32)
    linear.store_as(LinearFormat(name, activations))
    specs = parameter_specs(linear)
    linear = fill(linear, {n: jnp.asarray(a.reshape(specs[n].shape), specs[n].dtype) for n, a in arrays.items()})
    d_out = drawn(5, OUT, seed=4)
    found = jax.grad(lambda x: jnp.sum(jnp.asarray(d_out) * linear(x)))(jnp.asarray(drawn(5, IN, seed=3)))
    expected = d_out.astype(np.float64) @ values(arrays, name)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.ptp(expected))


def test_dropout_drops_its_share_before_a_and_nothing_of_the_base():
    weight, a, b = drawn(OUT, IN), drawn(RANK, IN, seed=1), drawn(OUT, RANK, seed=2)
    linear = fill(
        projection(dropout=0.25), {"weight": jnp.asarray(weight), "lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
    )
    x = jnp.ones((4000, IN))
    quiet = np.asarray(linear(x))
    set_dropout_keys(linear, jax.random.key(1))
    first, again = np.asarray(linear(x)), np.asarray(linear(x))
    np.testing.assert_array_equal(first, again)
    # What is left is known: the least squares solution of first - W x = s B A dropped is exact, rank 4 of 48 rows.
    inner = np.linalg.lstsq(SCALE * b.astype(np.float64), (first - weight.sum(1)).T, rcond=None)[0].T  # [T, R]
    expected = a.astype(np.float64).sum(1)
    spread = np.sqrt((a.astype(np.float64) ** 2).sum(1) * 0.25 / 0.75)
    np.testing.assert_allclose(inner.mean(0), expected, atol=4 * spread.max() / 4000**0.5)
    np.testing.assert_allclose(inner.std(0), spread, rtol=0.1)
    set_dropout_keys(linear, jax.random.key(2))
    assert np.abs(np.asarray(linear(x)) - first).max() > 0.1
    set_dropout_keys(linear, None)
    np.testing.assert_array_equal(linear(x), quiet)


def test_a_step_sets_keys_of_its_own_for_every_projection_and_layer_of_a_stack():
    model = abstract("mistral")
    attach(model, LoraConfig(rank=RANK, dropout=0.5))
    graph, state = nnx.split(StackedTransformer(filled(model)))

    @jax.jit
    def step(state, key):
        merged = nnx.merge(graph, state)
        set_dropout_keys(merged, key)
        keys = [jax.random.key_data(linear.dropout_key[...]) for linear in adapted(merged).values()]
        return merged.hidden(TOKENS), without_adapters(merged).hidden(TOKENS), jnp.concatenate(keys)

    first, base, keys = step(state, jax.random.key(0))
    second, same, _ = step(state, jax.random.key(1))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 0.1
    np.testing.assert_array_equal(base, same)
    np.testing.assert_array_equal(step(state, jax.random.key(0))[0], first)
    assert len(np.unique(keys, axis=0)) == len(keys) == 14


def test_config_fields_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoraConfig().rank = 3
    assert re.match(r"LoraConfig\(targets=\('wq', 'wk'", repr(LoraConfig()))
