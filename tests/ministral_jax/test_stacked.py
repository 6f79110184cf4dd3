"""The stacked decoder is the unrolled one: values, gradients, names, files; whatever its layers are like."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ministral_jax.catalog import find
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import Window
from ministral_jax.errors import ConfigError
from ministral_jax.linear import projections
from ministral_jax.lora import LoraConfig, attach, initialize_adapters
from ministral_jax.parameters import AdapterParam, ParameterSpec, fill, parameter_specs, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.stacked import (
    Pattern,
    Remat,
    StackedTransformer,
    Unstacked,
    attach_adapters,
    pattern,
    repetition,
    stack_arrays,
)
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

CLOSE, CLOSE_GRADIENTS = 1e-6, 1e-5  # of the range
# Tests of values do not wait for LLVM to optimise what runs once.
QUICK = {"xla_backend_optimization_level": 0}
PERIOD_OF_FOUR, PREFIX_OF_TWO = (None, 5, 5, 5) * 2, (7, 3, None, 5, None, 5)


def filled(model: Any, seed: int = 0) -> Any:
    """Every parameter drawn by its name: matrices wide, whole numbers for payloads, scales that fit them."""
    rng = np.random.default_rng(seed)

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        if spec.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, spec.shape, np.int8))
        center, width = (0.004, 0.001) if spec.init == "stored" else (1.0, 0.1) if spec.init == "ones" else (0.0, 0.3)
        return jnp.asarray(center + width * rng.standard_normal(spec.shape), spec.dtype)

    return fill(model, draw)


def unrolled(windows: tuple[Window, ...], *, stored: LinearFormat | None = None, rank: int = 0) -> Transformer:
    model = Transformer(tiny_config("ministral3", n_layers=len(windows), windows=windows), attention="reference")
    for projection in projections(model).values() if stored else ():
        assert stored is not None
        projection.store_as(stored)
    if rank:
        attach(model, LoraConfig(rank=rank))
    return filled(model)


def packed_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rows of three segments: tokens, positions, segments."""
    tokens = np.random.default_rng(1).integers(0, 128, (2, 24)).astype(np.int32)
    lengths = ([11, 4, 9], [3, 20, 1])
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    segments = np.stack([np.repeat([1, 2, 3], row) for row in lengths]).astype(np.int32)
    return tokens, positions, segments


def logits(model: Any, *arrays: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(state: Any, *arrays: jax.Array) -> jax.Array:
        merged = nnx.merge(graph, state)
        return merged.logits(merged.hidden(*arrays))

    return np.asarray(run(state, *arrays))


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Of every float parameter, under a checkpoint's names, for a loss of no meaning."""
    graph, state = nnx.split(model)
    arrays = [jnp.asarray(array) for array in packed_tokens()]

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.grad, allow_int=True)
    def run(state: Any) -> jax.Array:
        return jnp.sin(nnx.merge(graph, state).hidden(*arrays)).sum()

    named = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(run(state))}
    named = {name: array for name, array in named.items() if array.dtype == jnp.float32}
    named = Unstacked(named, model.pattern) if isinstance(model, StackedTransformer) else named
    return {name: np.asarray(named[name]) for name in named}


def assert_close(found: np.ndarray, expected: np.ndarray, close: float = CLOSE) -> None:
    assert np.abs(found - expected).max() <= close * max(np.ptp(expected), 1e-3)


def assert_same_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, CLOSE_GRADIENTS)


@pytest.mark.parametrize("windows", [PERIOD_OF_FOUR, PREFIX_OF_TWO], ids=["period of four", "prefix of two"])
def test_stacked_equals_unrolled_on_packed_segments_longer_than_windows(windows: tuple[Window, ...]) -> None:
    model = unrolled(windows)
    expected = logits(model, *packed_tokens())
    assert_close(logits(StackedTransformer(model), *packed_tokens()), expected)


def test_stacked_equals_unrolled_with_quantised_weights_and_adapters() -> None:
    """Gradients too, with a layer before the repetition."""
    model = unrolled((7, 5, 5), stored=LinearFormat("int8_channel"), rank=3)
    expected, expected_gradients = logits(model, *packed_tokens()), gradients(model)
    stacked = StackedTransformer(model)
    assert stacked.pattern == Pattern(1, 1, 2)
    assert_close(logits(stacked, *packed_tokens()), expected)
    assert_same_gradients(gradients(stacked), expected_gradients)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_are_the_same_whatever_the_backward_pass_keeps(remat: Remat) -> None:
    model = unrolled((None, 5) * 2)
    expected = gradients(model)
    assert_same_gradients(gradients(StackedTransformer(model, remat=remat)), expected)


def test_positions_default_to_whole_sequences() -> None:
    model = unrolled((5,) * 2)
    tokens = packed_tokens()[0]
    expected = logits(model, tokens)
    assert_close(logits(StackedTransformer(model), tokens), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ministral-8b-instruct-2410", Pattern(0, 4, 9)),
        ("ministral-3-3b-instruct-2512", Pattern(0, 1, 26)),
        ("mistral-7b-v0.1", Pattern(0, 1, 32)),
    ],
)
def test_published_models_repeat_so(name: str, expected: Pattern) -> None:
    assert pattern(find(name).config) == expected


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12))
def test_a_repetition_gives_back_its_kinds_and_never_more_blocks_than_layers(kinds: list[str]) -> None:
    found = repetition(kinds)
    assert found.n_layers == len(kinds)
    block = kinds[found.prefix : found.prefix + found.period]
    assert kinds[: found.prefix] + block * found.repeats == kinds


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_names_go_to_a_place_and_back(prefix: int, period: int, repeats: int) -> None:
    layout = Pattern(prefix, period, repeats)
    names = [f"layers.{i}.attention.wq.weight" for i in range(layout.n_layers)] + ["norm.weight"]
    homes = [layout.home(name) for name in names]
    assert len(set(homes)) == len(names)
    for name, (stacked_name, index) in zip(names, homes, strict=True):
        assert layout.names(stacked_name)[index or 0] == name
        assert (index is None) == (not stacked_name.startswith("places."))


def test_a_layer_that_is_stored_otherwise_is_not_stacked_with_the_rest() -> None:
    model = Transformer(tiny_config(n_layers=5))
    projections(model)["layers.0.attention.wq"].store_as(LinearFormat("int8_channel"))
    assert StackedTransformer(model).pattern == Pattern(1, 1, 4)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_checkpoint_read_into_stacks_is_the_one_read_in_layers(tmp_path: Path, layout: Any) -> None:
    weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral", n_layers=8), layout)
    model = load_model(tmp_path, stacked=True)
    assert parameters(model)["places.1.attention.wq.weight"].shape == (2, 64, 64)
    found = Unstacked(parameters(model), model.pattern)
    assert set(found) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, strict=True)


def test_unstacked_arrays_stack_again() -> None:
    model = StackedTransformer(unrolled(PREFIX_OF_TWO))
    arrays = parameters(model)
    again = stack_arrays(Unstacked(arrays, model.pattern), arrays, model.pattern)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(again[name]), np.asarray(array))


def test_adapters_of_a_stack_are_those_of_its_layers() -> None:
    """A stacked base that gets its adapters afterwards, against layers that had them before."""
    config = LoraConfig(rank=3, targets=("wq", "w2"), rank_pattern={"w2": 2}, alpha=8)
    model = StackedTransformer(unrolled(PREFIX_OF_TWO))
    attach_adapters(model, config)
    initialize_adapters(model, jax.random.key(0))
    before = Transformer(model.config)
    attach(before, config)
    assert parameter_specs(model) == parameter_specs(StackedTransformer(before))
    a = np.asarray(parameters(model)["places.0.attention.wq.lora_a"])
    assert a.shape == (2, 3, 64)
    assert 0.9 / 8 < np.abs(a).max() <= 1 / 8
    assert np.abs(a[0] - a[1]).max() > 0.01


def test_layers_of_one_stack_cannot_differ_in_rank() -> None:
    model = StackedTransformer(Transformer(tiny_config()))
    with pytest.raises(ConfigError, match=r"layers.0.attention.wq and layers.1.attention.wq would have different"):
        attach_adapters(model, LoraConfig(rank_pattern={"layers.1.attention.wq": 4}))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(Exception, match="remat"):
        StackedTransformer(Transformer(tiny_config()), remat="some")  # type: ignore[arg-type]


@functools.cache
def residual_bytes(remat: Remat) -> int:
    """What a block of 64 tokens in bfloat16 keeps for its backward pass, per token, beside weights."""
    config = tiny_config(dim=512, n_heads=16, n_kv_heads=4, head_dim=32, hidden_dim=1536, n_layers=2)
    model = StackedTransformer(Transformer(config, jnp.bfloat16, attention="xla"), remat=remat)
    graph, state = nnx.split(model)

    def run(state: Any, tokens: jax.Array) -> Any:
        return jax.vjp(lambda state: nnx.merge(graph, state).hidden(tokens), state)[1]

    leaves = jax.tree.leaves(jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, 64), jnp.int32)))
    per_layer = [leaf for leaf in leaves if leaf.shape[:1] == (2,) and 64 in leaf.shape[1:]]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in per_layer) // (2 * 64)


@pytest.mark.parametrize("stored", [LinearFormat("nf4"), LinearFormat("int8_channel", "dynamic")], ids=str)
def test_nothing_dequantised_is_kept_for_the_backward_pass(stored: LinearFormat) -> None:
    """Of each layer's matrices only what is stored, also where all else is kept; tokens are 24, like no width."""
    model = Transformer(tiny_config(n_layers=2), attention="xla")
    for projection in projections(model).values():
        projection.store_as(stored)
    attach(model, LoraConfig(rank=3))
    graph, adapters, rest = nnx.split(StackedTransformer(model, remat="none"), AdapterParam, ...)

    def run(adapters: Any, rest: Any, tokens: jax.Array) -> Any:
        return jax.vjp(lambda adapters: nnx.merge(graph, adapters, rest).hidden(tokens), adapters)[1]

    leaves = jax.tree.leaves(jax.eval_shape(run, adapters, rest, jax.ShapeDtypeStruct((1, 24), jnp.int32)))
    of_layers = {leaf.shape for leaf in leaves if leaf.dtype == jnp.float32 and leaf.ndim == 3 and leaf.shape[0] == 2}
    matrices = {shape for shape in of_layers if 24 not in shape and min(shape[1:]) > 2}  # not nf4's constants
    assert matrices <= {leaf.shape for leaf in jax.tree.leaves(adapters)}


def test_policies_keep_what_they_say() -> None:
    """The figures in stacked.py, D = N H = 512, K H = 128, F = 1536, but for a few numbers per token."""
    width, kv_width, hidden = 512, 128, 1536
    assert residual_bytes("full") == 2 * width
    assert residual_bytes("dots") == 2 * (3 * width + 2 * kv_width + 2 * hidden)
    expected = 22 * width + 4 * kv_width + 12 * hidden
    assert expected <= residual_bytes("none") <= 1.01 * expected
