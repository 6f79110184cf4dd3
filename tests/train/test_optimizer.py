"""AdamW and its schedules against torch's formulas, and, where torch is installed, against torch itself."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.errors import ConfigError
from ministral_jax.parameters import ParameterSpec
from train.optimizer import Optimizer, OptimizerConfig, compat_config

STEPS = 40
SPECS = {
    "places.0.attention.wq.lora_a": ParameterSpec((2, 3, 4), ("layers", "rank", "embed"), jnp.float32, "fan_in", True),
    "places.0.attention_norm.weight": ParameterSpec((2, 4), ("layers", "norm"), jnp.float32, "ones"),
    "output.weight": ParameterSpec((5, 4), ("vocab", "embed"), jnp.float32),
}
NORM = "places.0.attention_norm.weight"


def cosine(step: int, steps: int, warmup: int, top: float, final: float) -> float:
    """transformers' get_cosine_schedule_with_warmup, and its relative with a lowest rate."""
    if step < warmup:
        return top * step / max(1, warmup)
    share = (step - warmup) / max(1, steps - warmup)
    return top * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def one_cycle(step: int, steps: int, share: float, top: float) -> tuple[float, float]:
    """torch's OneCycleLR with its defaults: the rate and beta1."""
    turn, last = share * steps - 1, steps - 1
    if step <= turn:
        passed, rates, betas = step / turn, (top / 25, top), (0.95, 0.85)
    else:
        passed, rates, betas = (step - turn) / (last - turn), (top, top / 25 / 1e4), (0.85, 0.95)
    bend = (1 + math.cos(math.pi * passed)) / 2
    return rates[1] + (rates[0] - rates[1]) * bend, betas[1] + (betas[0] - betas[1]) * bend


def rates(config: OptimizerConfig) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(config.rate))(jnp.arange(config.steps)))


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (7, 0.0), (7, 0.1), (STEPS, 0.0)])
def test_cosine_is_that_of_transformers(warmup: int, final: float) -> None:
    config = OptimizerConfig(learning_rate=3e-4, steps=STEPS, warmup_steps=warmup, final_share=final)
    expected = [cosine(step, STEPS, warmup, 3e-4, final) for step in range(STEPS)]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-6, atol=1e-14)


def test_linear_falls_in_a_straight_line_and_constant_stays() -> None:
    linear = OptimizerConfig(learning_rate=1.0, steps=10, warmup_steps=2, schedule="linear")
    np.testing.assert_allclose(rates(linear), [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125], rtol=1e-6)
    constant = dataclasses.replace(linear, schedule="constant")
    np.testing.assert_allclose(rates(constant), [0, 0.5, *[1] * 8], rtol=1e-6)


@pytest.mark.parametrize(("steps", "share"), [(STEPS, 0.3), (300, 0.05), (7, 0.05)])
def test_one_cycle_is_that_of_torch(steps: int, share: float) -> None:
    """Also where the warm-up is less than a step, and down to the smallest rates."""
    config = OptimizerConfig(learning_rate=6e-5, steps=steps, schedule="onecycle", warmup_share=share)
    expected = np.array([one_cycle(step, steps, share, 6e-5) for step in range(steps)])
    np.testing.assert_allclose(rates(config), expected[:, 0], rtol=2e-6)
    momenta = jax.vmap(config.momentum)(jnp.arange(steps))
    np.testing.assert_allclose(np.asarray(momenta), expected[:, 1], rtol=1e-6)


def test_a_warm_up_of_one_step_begins_at_the_top() -> None:
    """torch divides by zero there."""
    config = OptimizerConfig(learning_rate=1.0, steps=20, schedule="onecycle", warmup_share=0.05)
    found = rates(config)
    assert found[0] == 1.0
    assert (np.diff(found) < 0).all()


def drawn(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32) for name, spec in SPECS.items()}


def trajectory(config: OptimizerConfig, steps: int = 6) -> Iterator[dict[str, np.ndarray]]:
    """The parameters after each step, whose gradients are drawn."""
    optimizer = Optimizer(config, SPECS)
    parameters = drawn(0)
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        parameters, state = update(drawn(step + 1), state, parameters, jnp.asarray(step))
        yield {name: np.asarray(array) for name, array in parameters.items()}


def adamw(config: OptimizerConfig, steps: int = 6) -> Iterator[dict[str, np.ndarray]]:
    """torch.optim.AdamW after clip_grad_norm_, in float64 by its documented formulas."""
    parameters = {name: np.asarray(array, np.float64) for name, array in drawn(0).items()}
    m = {name: np.zeros_like(array) for name, array in parameters.items()}
    v = {name: np.zeros_like(array) for name, array in parameters.items()}
    for step in range(steps):
        gradients = {name: np.asarray(array, np.float64) for name, array in drawn(step + 1).items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))
        rate, beta1 = float(config.rate(jnp.asarray(step))), float(config.momentum(jnp.asarray(step)))
        for name, gradient in gradients.items():
            decays = config.decayed == "all" or name != NORM
            m[name] = beta1 * m[name] + (1 - beta1) * factor * gradient
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * (factor * gradient) ** 2
            parameters[name] = parameters[name] * (1 - rate * config.weight_decay * decays)
            root = np.sqrt(v[name] / (1 - config.beta2 ** (step + 1))) + config.epsilon
            parameters[name] = parameters[name] - rate * m[name] / (1 - beta1 ** (step + 1)) / root
        yield dict(parameters)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=0.05, steps=8, warmup_steps=2),
        OptimizerConfig(learning_rate=0.05, steps=8, weight_decay=0.3, clip_norm=None, schedule="constant"),
        compat_config(learning_rate=0.05, steps=8, weight_decay=0.3, warmup_share=0.4, clip_norm=1.5),
    ],
    ids=["transformers", "decay of matrices", "mistral-finetune"],
)
def test_steps_are_those_of_adamw(config: OptimizerConfig) -> None:
    for found, expected in zip(trajectory(config), adamw(config), strict=True):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6, err_msg=name)


def test_moments_are_kept_of_trained_parameters_alone_and_in_float32() -> None:
    state = Optimizer(OptimizerConfig(learning_rate=1.0, steps=1), SPECS).init(drawn(0))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * sum(math.prod(spec.shape) for spec in SPECS.values())
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("steps", 0), ("warmup_steps", 41), ("warmup_share", 1.1),
        ("final_share", -0.1), ("beta1", 1.0), ("beta2", -0.1), ("epsilon", 0.0), ("weight_decay", math.inf),
        ("clip_norm", 0.0), ("schedule", "cosines"), ("decayed", "none"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    good = OptimizerConfig(learning_rate=1e-4, steps=STEPS)
    object.__setattr__(good, field, value)  # past the type checks of tests
    with pytest.raises(ConfigError, match=rf"^{field}={value!r} is not allowed: expected"):
        good.__post_init__()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_torch_itself_takes_the_same_steps() -> None:
    """torch's AdamW, OneCycleLR and clip_grad_norm_ as mistral-finetune calls them."""
    torch: Any = pytest.importorskip("torch")
    config = compat_config(learning_rate=0.05, steps=8, weight_decay=0.3, warmup_share=0.4, clip_norm=1.5)
    weights = {name: torch.nn.Parameter(torch.tensor(np.asarray(array))) for name, array in drawn(0).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8, pct_start=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, found in enumerate(trajectory(config, steps=7)):
            for name, array in drawn(step + 1).items():
                weights[name].grad = torch.tensor(np.asarray(array))
            group = optimizer.param_groups[0]
            np.testing.assert_allclose(float(config.rate(jnp.asarray(step))), group["lr"], rtol=1e-6)
            np.testing.assert_allclose(float(config.momentum(jnp.asarray(step))), group["betas"][0], rtol=1e-6)
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.5)
            optimizer.step()
            schedule.step()
            for name, weight in weights.items():
                np.testing.assert_allclose(found[name], weight.detach().numpy(), rtol=0, atol=2e-6, err_msg=name)
