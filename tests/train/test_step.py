"""The training step: what it minimises, what it leaves alone, and that meshes and microbatches change nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.config import Window
from ministral_jax.errors import ConfigError, ShardingError
from ministral_jax.linear import projections
from ministral_jax.lora import LoraConfig
from ministral_jax.parameters import ParameterSpec, fill, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.stacked import StackedTransformer, attach_adapters
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import tiny_config
from train.data.batches import Batch
from train.objective import NextToken
from train.optimizer import Optimizer, OptimizerConfig
from train.step import Metrics, TrainState, TrainStep, trained_specs

ROWS, LENGTH = 8, 12
CLOSE = 1e-5
QUICK = {"xla_backend_optimization_level": 0}
# A large epsilon, so that a gradient of rounding errors is not blown up to a whole step.
CONFIG = OptimizerConfig(learning_rate=0.1, steps=10, epsilon=1e-2, schedule="constant")


def model_of(
    *, rank: int = 0, dropout: float = 0.0, windows: tuple[Window, ...] = (5, 5), layout: Layout | None = None,
    dtype: Any = jnp.float32, stored: LinearFormat | None = None, attention: Any = "reference",
) -> StackedTransformer:  # fmt: skip
    """Random, and the same on every layout; adapters not at their beginning, where half of them have no gradient."""
    config = tiny_config("ministral3", n_layers=len(windows), windows=windows)
    layers = Transformer(config, dtype, attention=attention, layout=layout)
    for projection in projections(layers).values() if stored else ():
        assert stored is not None
        projection.store_as(stored)
    model = StackedTransformer(layers)
    if rank:
        attach_adapters(model, LoraConfig(rank=rank, dropout=dropout, targets=("wq", "w2")))
    rng = np.random.default_rng(0)

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        values = (spec.init == "ones") + 0.2 * rng.standard_normal(spec.shape)
        values = values.astype(spec.dtype if spec.init == "stored" else dtype)
        return jax.device_put(values, None if layout is None else layout.placement(name, spec))

    return fill(model, draw)


def stepper(model: StackedTransformer, config: OptimizerConfig = CONFIG, **options: Any) -> TrainStep:
    return TrainStep(model, Optimizer(config, trained_specs(model)), options=QUICK, **options)


@functools.cache
def adapter_step() -> TrainStep:
    """Of `model_of(rank=3)`, compiled once for all tests with one microbatch, and once for two."""
    return stepper(model_of(rank=3))


def batch_of(rows: int = ROWS, seed: int = 0) -> Batch:
    """Rows [B, T] of two segments, whose lengths and numbers of trained tokens differ."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128, (rows, LENGTH + 1)).astype(np.int32)
    cut = rng.integers(3, LENGTH - 3, rows)
    segments = 1 + (np.arange(LENGTH) >= cut[:, None]).astype(np.int32)
    positions = np.where(segments == 2, np.arange(LENGTH) - cut[:, None], np.arange(LENGTH)).astype(np.int32)
    weights = (rng.uniform(size=(rows, LENGTH)) < np.linspace(0.1, 1.0, rows)[:, None]).astype(np.float32)
    weights[:, 0] = 1
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)


def in_microbatches(batch: Batch, count: int) -> Batch:
    return Batch(*(array.reshape(count, -1, LENGTH) for array in batch))


def run(step: TrainStep, model: StackedTransformer, *batches: Batch) -> tuple[TrainState, Metrics]:
    state = step.initial_state(model, jax.random.key(7))
    metrics = None
    for batch in batches:
        state, metrics = step(state, batch)
    assert metrics is not None
    return state, metrics


def assert_same(found: tuple[TrainState, Metrics], expected: tuple[TrainState, Metrics]) -> None:
    np.testing.assert_allclose(np.asarray(found[1].loss), np.asarray(expected[1].loss), rtol=CLOSE)
    np.testing.assert_allclose(np.asarray(found[1].gradient_norm), np.asarray(expected[1].gradient_norm), rtol=CLOSE)
    for name, array in expected[0].trained.items():
        wanted = np.asarray(array)
        np.testing.assert_allclose(np.asarray(found[0].trained[name]), wanted, rtol=0, atol=CLOSE * np.ptp(wanted))


def test_accumulated_microbatches_are_one_big_batch() -> None:
    """Whose rows have from one to all of their tokens trained; and the metrics say how many that is."""
    batch = batch_of()
    expected = run(adapter_step(), model_of(rank=3), in_microbatches(batch, 1))
    found = run(adapter_step(), model_of(rank=3), in_microbatches(batch, 2))
    assert_same(found, expected)
    assert int(found[1].tokens) == np.count_nonzero(batch.loss_weights)


def losses_and_weights(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of each row by itself: sums [B]."""
    state = adapter_step().initial_state(model_of(rank=3), jax.random.key(0))
    alone = [np.where(np.arange(ROWS)[:, None] == row, batch.loss_weights, 0) for row in range(ROWS)]
    sums = [adapter_step().evaluate(state, batch._replace(loss_weights=weights)) for weights in alone]
    losses, weights, _ = map(np.asarray, zip(*sums, strict=True))
    return losses, weights


def test_the_loss_is_the_mean_over_all_trained_tokens() -> None:
    losses, weights = losses_and_weights(batch_of())
    _, metrics = run(adapter_step(), model_of(rank=3), in_microbatches(batch_of(), 2))
    np.testing.assert_allclose(float(metrics.loss), losses.sum() / weights.sum(), rtol=CLOSE)


@pytest.mark.long
def test_the_loss_is_the_mean_over_groups_of_rows_of_their_means_if_asked_for() -> None:
    losses, weights = losses_and_weights(batch_of())
    model = model_of(rank=3)
    _, metrics = run(stepper(model, objective=NextToken(rows_per_mean=2)), model, in_microbatches(batch_of(), 2))
    pairs = losses.reshape(4, 2).sum(axis=1) / weights.reshape(4, 2).sum(axis=1)
    np.testing.assert_allclose(float(metrics.loss), pairs.mean(), rtol=CLOSE)


def test_shares_of_a_group_without_trained_tokens_are_zero() -> None:
    weights = jnp.asarray([[[1.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 3.0]]])
    by_row = np.asarray(NextToken(rows_per_mean=1).shares(weights)).sum(axis=2)
    np.testing.assert_allclose(by_row, [[0.25, 0.0], [0.25, 0.25]])
    np.testing.assert_allclose(np.asarray(NextToken().shares(weights)), np.asarray(weights) / 7)
    assert not np.asarray(NextToken().shares(0 * weights)).any()
    with pytest.raises(ConfigError, match="a microbatch of 2 rows does not divide into groups of 3"):
        NextToken(rows_per_mean=3).shares(weights)


def test_packed_segments_are_separate_sequences() -> None:
    """Sixteen rows of one segment each, as two microbatches of eight, against eight rows of two."""
    packed = batch_of()
    rows = []
    for row, segment in itertools.product(range(ROWS), (1, 2)):
        inside = packed.segment_ids[row] == segment
        rows.append([np.pad(array[row][inside], (0, LENGTH - inside.sum())) for array in packed])
    apart = Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
    expected = run(adapter_step(), model_of(rank=3), in_microbatches(apart, 2))
    assert_same(run(adapter_step(), model_of(rank=3), in_microbatches(packed, 1)), expected)


def test_one_program_serves_all_steps_and_only_adapters_change() -> None:
    model, step = model_of(rank=3), adapter_step()
    run(step, model_of(rank=3), in_microbatches(batch_of(), 2))
    programs = step._compiled._cache_size()
    before = {name: np.asarray(array).copy() for name, array in parameters(model).items()}
    state, metrics = run(step, model, *(in_microbatches(batch_of(seed=seed), 2) for seed in range(3)))
    assert step._compiled._cache_size() == programs
    assert int(state.step) == 3
    assert bool(metrics.finite)
    assert {name for name in before if "lora" in name} == set(state.trained)
    for name, array in {**state.trained, **state.frozen}.items():
        same = np.array_equal(np.asarray(array), before[name])
        assert same == (name in state.frozen), name


def test_repeated_steps_lower_the_loss_of_what_they_see() -> None:
    step, batch = adapter_step(), in_microbatches(batch_of(), 1)
    state = step.initial_state(model_of(rank=3), jax.random.key(0))
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert sorted(losses, reverse=True) == losses


def test_dropout_follows_the_key_of_the_run_and_is_off_in_evaluation() -> None:
    step = stepper(model_of(rank=3, dropout=0.4))
    batch = in_microbatches(batch_of(), 2)

    def loss(seed: int, done: int = 0) -> float:
        state = step.initial_state(model_of(rank=3, dropout=0.4), jax.random.key(seed))
        return float(step(dataclasses.replace(state, step=jnp.asarray(done)), batch)[1].loss)

    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(0, done=1)}) == 3
    state = step.initial_state(model_of(rank=3, dropout=0.4), jax.random.key(0))
    total, weight, _ = step.evaluate(state, batch_of())
    _, metrics = run(adapter_step(), model_of(rank=3), batch)
    np.testing.assert_allclose(float(total / weight), float(metrics.loss), rtol=CLOSE)


def test_a_gradient_that_is_not_finite_is_reported_and_changes_nothing() -> None:
    step, batch = adapter_step(), batch_of()
    state = step.initial_state(model_of(rank=3), jax.random.key(0))
    before = jax.tree.map(lambda array: np.asarray(array).copy(), (state.trained, state.moments))
    batch.loss_weights[0, 0] = math.inf
    state, metrics = step(state, in_microbatches(batch, 1))
    assert not bool(metrics.finite)
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.trained, state.moments), before)


@pytest.mark.long
def test_without_adapters_all_is_trained_on_copies_that_are_float32() -> None:
    """Steps smaller than bfloat16 can hold add up, and the model computes in bfloat16."""
    model = model_of(windows=(5,), dtype=jnp.bfloat16)
    before = {name: np.asarray(array, np.float32) for name, array in parameters(model).items()}
    step = stepper(model, dataclasses.replace(CONFIG, learning_rate=1e-5, epsilon=1e-8))
    state, _ = run(step, model, *[in_microbatches(batch_of(2), 1)] * 3)
    assert set(state.trained) == set(before)
    assert not state.frozen
    moved = np.abs(np.asarray(state.trained["output.weight"]) - before["output.weight"])
    assert 2.5e-5 < moved.max() < 3.5e-5
    computed = step.model(state.trained, {}, None)
    assert {array.dtype for array in parameters(computed).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.long
@pytest.mark.parametrize("attention", ["reference", "xla"])
def test_adapters_in_a_bfloat16_model_get_the_gradients_of_float32(attention: str) -> None:
    """As compiled without the tests' short cuts: XLA's CPU backend cannot run every product of 16 bits."""
    _, expected = run(adapter_step(), model_of(rank=3), in_microbatches(batch_of(), 1))
    model = model_of(rank=3, dtype=jnp.bfloat16, attention=attention)
    _, found = run(TrainStep(model, Optimizer(CONFIG, trained_specs(model))), model, in_microbatches(batch_of(), 1))
    np.testing.assert_allclose(float(found.loss), float(expected.loss), rtol=2e-2)
    np.testing.assert_allclose(float(found.gradient_norm), float(expected.gradient_norm), rtol=5e-2)


def test_quantised_weights_without_adapters_are_refused() -> None:
    model = Transformer(tiny_config())
    for projection in projections(model).values():
        projection.store_as(LinearFormat("int8_channel"))
    with pytest.raises(ConfigError, match="quantised and cannot be trained: train adapters, or load a dense model"):
        trained_specs(StackedTransformer(model))


def test_rows_that_do_not_divide_over_the_mesh_are_refused() -> None:
    layout = layout_for(model_of().config, make_mesh("data=2,fsdp=4"))
    step = stepper(model_of(layout=layout))
    with pytest.raises(ShardingError, match="a batch of 6 rows does not divide over data x fsdp=8: expected"):
        step.lower(*step.shapes(1, 6, LENGTH))


def two_batches() -> list[Batch]:
    return [in_microbatches(batch_of(seed=seed), 1) for seed in range(2)]


@functools.cache
def on_one_device(rank: int) -> tuple[TrainState, Metrics]:
    model = model_of(rank=rank, windows=(None, 5))
    return run(stepper(model), model, *two_batches())


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 3], ids=["all weights", "adapters"])
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,fsdp=4", "data=2,context=2,tensor=2"])
def test_eight_devices_take_the_steps_of_one(mesh: str, rank: int) -> None:
    layout = layout_for(model_of().config, make_mesh(mesh))
    model = model_of(rank=rank, windows=(None, 5), layout=layout)
    step = stepper(model)
    found = run(step, model, *two_batches())
    assert_same(found, on_one_device(rank))
    for name, array in found[0].trained.items():
        assert array.sharding.is_equivalent_to(layout.placement(name, step.trained_specs[name]), array.ndim)
    assert step._compiled._cache_size() == 1
