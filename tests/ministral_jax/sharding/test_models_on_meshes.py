"""A model on eight simulated devices is the model on one: logits, gradients, generated tokens; and what it costs."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer.generate import Generator
from infer.sampling import SamplingParams
from infer.scoring import score
from ministral_jax.config import ModelConfig, MoEConfig, RopeConfig
from ministral_jax.parameters import fill, initialize, parameter_specs, parameters
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.sharding.rules import RULES
from ministral_jax.transformer import Transformer

LAYERS, WINDOW = 2, 6
MESHES = {
    "data": "data=8",
    "tensor": "tensor=4",
    "fsdp": "fsdp=8",
    "fsdp+tensor": "fsdp=4,tensor=2",
    "expert": "expert=4,tensor=2",
    "context": "context=4,tensor=2",
    "all": "data=2,context=2,tensor=2",
    "repeated heads": "tensor=8",
}


def tables(*names: str) -> list:
    """One in the default run; the others take longer to compile than to understand."""
    return [name if name == "fsdp+tensor" else pytest.param(name, marks=pytest.mark.long) for name in names]


COLLECTIVES = re.compile(r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@functools.cache
def config_for(rules: str) -> ModelConfig:
    moe = MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=48) if rules == "expert" else None
    return ModelConfig(
        dim=32, n_layers=LAYERS, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=48, vocab_size=96, norm_eps=1e-5,
        rope=RopeConfig(theta=100.0), windows=(None, WINDOW), max_length=128, moe=moe,
    )  # fmt: skip


@functools.cache
def one_device(rules: str) -> Transformer:
    return initialize(Transformer(config_for(rules)), jax.random.key(3), std=0.3)


@functools.cache
def on_mesh(rules: str) -> Transformer:
    config, arrays = config_for(rules), parameters(one_device(rules))
    layout = layout_for(config, make_mesh(MESHES[rules]), rules if rules in RULES else "all")
    model = Transformer(config, layout=layout)
    return fill(model, lambda name, spec: jax.device_put(arrays[name], layout.placement(name, spec)))


def layout_of(model: Transformer) -> Layout:
    assert model.layout is not None
    return model.layout


def tokens_for(model: Transformer) -> jax.Array:
    return jax.random.randint(jax.random.key(5), (8, 16), 0, model.config.vocab_size)


def assert_near(found: jax.Array, expected: jax.Array, tolerance: float = 1e-5) -> None:
    expected = np.asarray(expected)
    scale = expected.max() - expected.min()
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * scale)


@functools.cache
def logits_and_gradients(graph) -> jax.stages.Wrapped:
    """Logits, and the gradient of every parameter of a loss in which each logit has a weight of its own."""

    def loss(state, tokens, weights):
        logits = nnx.merge(graph, state)(tokens)
        return (logits * weights).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(model: Transformer):
    tokens = tokens_for(model)
    weights = jax.random.normal(jax.random.key(6), (*tokens.shape, model.config.vocab_size))
    graph, state = nnx.split(model)
    (_, logits), gradients = logits_and_gradients(graph)(state, tokens, weights)
    return logits, parameters(nnx.merge(graph, gradients))


@pytest.mark.parametrize("rules", tables(*MESHES))
def test_logits_and_gradients_are_those_of_one_device(rules):
    expected_logits, expected = run(one_device(rules))
    logits, gradients = run(on_mesh(rules))
    assert_near(logits, expected_logits)
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name])


@pytest.mark.parametrize("rules", tables(*MESHES))
def test_scores_and_generated_tokens_are_those_of_one_device(rules):
    prompts = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (3, 40, 17)]

    def answers(model: Transformer):
        generator = Generator(model, page_size=4, prefill_chunk=16)
        return [completion.ids for completion in generator.generate(prompts, SamplingParams(max_tokens=10))]

    assert answers(on_mesh(rules)) == answers(one_device(rules))
    expected, found = score(one_device(rules), prompts[1]), score(on_mesh(rules), prompts[1])
    np.testing.assert_allclose(found.logprobs[1:], expected.logprobs[1:], atol=1e-4)


@pytest.mark.parametrize("rules", tables("tensor", "fsdp", "fsdp+tensor", "context", "expert"))
def test_no_device_holds_a_whole_matrix(rules):
    model = on_mesh(rules)
    layout = layout_of(model)
    held: Counter[jax.Device] = Counter()
    for name, array in parameters(model).items():
        spec = parameter_specs(model)[name]
        parts = array.size // array.addressable_shards[0].data.size
        router = name.endswith("gate.weight")
        assert parts > 1 or spec.axes == ("norm",) or router, f"{name} stands whole on every device"
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(set(held.values())) == 1
    assert len(held) == layout.mesh.size


def collectives(model: Transformer) -> Counter[str]:
    """Of the compiled forward pass, by kind."""
    graph, state = nnx.split(model)
    axes = ("batch", "sequence")
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=layout_of(model).sharding(axes))
    compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens).compile()
    return Counter(COLLECTIVES.findall(compiled.as_text()))


# A layer has 7 matrices, each gathered once; embeddings and head are two more. Row-parallel products end in an
# all-reduce, two in a layer, and so does the lookup in a split vocabulary.
GATHERS, REDUCES = 7 * LAYERS + 2, 2 * LAYERS + 1
EXPECTED = {
    "data": {},
    "tensor": {"all-reduce": REDUCES},
    "fsdp": {"all-gather": GATHERS},
    "fsdp+tensor": {"all-gather": GATHERS, "all-reduce": REDUCES},
}


@pytest.mark.parametrize("rules", tables(*EXPECTED))
def test_the_compiled_program_has_the_collectives_that_were_meant(rules):
    assert collectives(on_mesh(rules)) == EXPECTED[rules]


@pytest.mark.parametrize("rules", tables("context", "all"))
def test_under_context_keys_are_passed_on_and_nothing_else_is_added(rules):
    found = collectives(on_mesh(rules))
    assert found.pop("collective-permute") > 0
    assert found == {"all-gather": GATHERS, "all-reduce": REDUCES}


def test_gradients_are_reduced_into_the_shards_that_keep_them():
    """No gradient of a matrix is whole on any device."""
    model = on_mesh("fsdp+tensor")
    _, gradients = run(model)
    for name, spec in parameter_specs(model).items():
        assert gradients[name].sharding.is_equivalent_to(layout_of(model).placement(name, spec), len(spec.shape)), name


@pytest.mark.long
def test_pages_of_full_attention_are_spread_over_context():
    model = on_mesh("context")
    generator = Generator(model, page_size=4, prefill_chunk=16)
    generator.generate([list(range(40))], SamplingParams(max_tokens=4))
    assert generator.cache_plan is not None
    full, windowed = generator.cache_plan.groups
    assert (full.context, windowed.context) == (4, 1)
    assert full.pages == generator.cache_plan.table_width // 4 + 1
