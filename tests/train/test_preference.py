"""Preference training: the loss of pairs by its formula, what counts, and that meshes and microbatches are one."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.errors import ConfigError, ShardingError
from ministral_jax.lora import adapted, without_adapters
from ministral_jax.parameters import parameters
from ministral_jax.sharding.layout import layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.stacked import StackedTransformer
from train.data.batches import Batch
from train.objective import Preference, PreferenceConfig
from train.step import TrainStep

from .test_step import CLOSE, LENGTH, assert_same, in_microbatches, model_of, run, stepper

PAIRS = 8
CONFIG = PreferenceConfig(beta=0.3, label_smoothing=0.1)


def pairs_of(seed: int = 0, *, empty: int = 0) -> Batch:
    """Rows [2 PAIRS, T]: a prompt common to both rows of a pair, then answers of different lengths, then padding.

    The last `empty` pairs are padding.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128, (PAIRS, 2, LENGTH + 1)).astype(np.int32)
    prompt, ends = rng.integers(1, 5, (PAIRS, 1, 1)), rng.integers(6, LENGTH + 1, (PAIRS, 2, 1))
    place = np.arange(LENGTH + 1)
    tokens = np.where(place < prompt, tokens[:, :1], tokens)
    ends[PAIRS - empty :] = 0
    weights = ((place[1:] >= prompt) & (place[1:] <= ends)).astype(np.float32)
    segments = np.broadcast_to(place[:-1] < ends, weights.shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), weights.shape)
    arrays = (tokens[..., :-1], tokens[..., 1:], weights, positions, segments)
    return Batch(*(np.ascontiguousarray(array).reshape(2 * PAIRS, LENGTH) for array in arrays))


def preferring(model: StackedTransformer, **options: Any) -> TrainStep:
    return stepper(model, objective=Preference(CONFIG, chunk=20), **options)


@functools.cache
def adapter_step() -> TrainStep:
    return preferring(model_of(rank=3))


def log_probs(model: StackedTransformer, batch: Batch) -> jax.Array:
    """Of each row's answer, over all logits at once."""
    hidden = model.hidden(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    every = jax.nn.log_softmax(model.logits(hidden))
    return (jnp.take_along_axis(every, batch.targets[..., None], axis=-1)[..., 0] * batch.loss_weights).sum(axis=1)


def by_formula(model: StackedTransformer, batch: Batch, n_pairs: int = PAIRS) -> tuple[jax.Array, dict[str, Any]]:
    """Equation 7 of the paper, with the probability of each pair being the right way round, and what is told beside."""
    rewards = CONFIG.beta * (log_probs(model, batch) - log_probs(without_adapters(model), batch))[: 2 * n_pairs]
    chosen, rejected = rewards[0::2], rewards[1::2]
    right = 1 / (1 + jnp.exp(rejected - chosen))
    losses = -(1 - CONFIG.label_smoothing) * jnp.log(right) - CONFIG.label_smoothing * jnp.log(1 - right)
    beside = {"chosen_reward": chosen, "rejected_reward": rejected, "accuracy": chosen > rejected}
    return losses.mean(), {name: value.mean() for name, value in beside.items()}


def test_loss_gradient_and_rewards_are_those_of_the_formula() -> None:
    """With adapters away from their beginning, and answers across the window."""
    model, batch, step = model_of(rank=3), pairs_of(), adapter_step()
    expected, beside = by_formula(model, batch)
    state = step.initial_state(model_of(rank=3), jax.random.key(0))

    def loss(trained: Any) -> jax.Array:
        shares = jnp.full(PAIRS, 1 / PAIRS)
        return step.objective.sums(step.model(trained, state.frozen, None), jax.tree.map(jnp.asarray, batch), shares)[0]

    found = jax.jit(jax.grad(loss))(state.trained)
    wanted = jax.jit(jax.grad(lambda t: by_formula(step.model(t, state.frozen, None), batch)[0]))(state.trained)
    for name, gradient in wanted.items():
        error = np.abs(np.asarray(found[name] - gradient)).max()
        assert error <= CLOSE * np.abs(np.asarray(gradient)).max(), name
    _, metrics = run(step, model_of(rank=3), in_microbatches(batch, 1))
    np.testing.assert_allclose(float(metrics.loss), float(expected), rtol=CLOSE)
    assert 0 < float(beside["accuracy"]) < 1
    for name, value in beside.items():
        np.testing.assert_allclose(float(metrics.values[name]), float(value), rtol=1e-4)


def test_an_adapter_that_changes_nothing_has_no_preference() -> None:
    model = model_of(rank=3)
    for linear in adapted(model).values():
        linear.lora_b = linear.lora_b.replace(jnp.zeros_like(linear.lora_b[...]))
    state = adapter_step().initial_state(model, jax.random.key(0))
    loss, weight, values = adapter_step().evaluate(state, pairs_of())
    np.testing.assert_allclose(float(loss), PAIRS * math.log(2), rtol=1e-6)
    assert float(weight) == PAIRS
    assert {name: float(value) for name, value in values.items()} == dict.fromkeys(values, 0.0)


def test_pairs_that_fill_up_count_nothing() -> None:
    expected, beside = by_formula(model_of(rank=3), pairs_of(), n_pairs=PAIRS - 3)
    _, metrics = run(adapter_step(), model_of(rank=3), in_microbatches(pairs_of(empty=3), 1))
    np.testing.assert_allclose(float(metrics.loss), float(expected), rtol=CLOSE)
    np.testing.assert_allclose(float(metrics.values["accuracy"]), float(beside["accuracy"]), rtol=1e-6)


def test_microbatches_are_one_big_batch() -> None:
    """One of which has fewer pairs than the other."""
    batch = pairs_of(empty=3)
    expected = run(adapter_step(), model_of(rank=3), in_microbatches(batch, 1))
    assert_same(run(adapter_step(), model_of(rank=3), in_microbatches(batch, 2)), expected)


def test_steps_raise_the_chosen_above_the_rejected_and_leave_the_base_alone() -> None:
    model, batch = model_of(rank=3), in_microbatches(pairs_of(), 1)
    before = {name: np.asarray(array).copy() for name, array in parameters(model).items()}
    state = adapter_step().initial_state(model, jax.random.key(0))
    told = []
    for _ in range(8):
        state, metrics = adapter_step()(state, batch)
        told.append((float(metrics.loss), float(metrics.values["accuracy"])))
    assert told[-1][0] < 0.8 * told[0][0]
    assert told[-1][1] == 1 > told[0][1]
    for name, array in state.frozen.items():
        np.testing.assert_array_equal(np.asarray(array), before[name])


def test_a_row_without_its_other_one_is_refused() -> None:
    with pytest.raises(ShardingError, match="a batch of 3 rows does not divide: expected a multiple of 2 rows"):
        adapter_step().lower(*adapter_step().shapes(1, 3, LENGTH))
    layout = layout_for(model_of().config, make_mesh("data=2,fsdp=4"))
    step = preferring(model_of(rank=3, layout=layout))
    with pytest.raises(ShardingError, match="a batch of 8 rows does not divide over data x fsdp=8: expected a multi"):
        step.lower(*step.shapes(1, 8, LENGTH))


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": math.inf}, {"label_smoothing": 0.5}])
def test_values_that_are_not_allowed_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"preference.{next(iter(wrong))}: "):
        PreferenceConfig(**wrong)


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
def test_eight_devices_take_the_step_of_one(mesh: str) -> None:
    layout = layout_for(model_of().config, make_mesh(mesh))
    model, batch = model_of(rank=3, layout=layout), in_microbatches(pairs_of(empty=1), 1)
    found = run(preferring(model), model, batch)
    expected = run(adapter_step(), model_of(rank=3), batch)
    assert_same(found, expected)
    for name, value in expected[1].values.items():
        np.testing.assert_allclose(float(found[1].values[name]), float(value), rtol=1e-4)
