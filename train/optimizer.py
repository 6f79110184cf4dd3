"""AdamW with its schedules, as PyTorch, Hugging Face and mistral-finetune run it, on top of optax.

Rates are functions of the step alone (0 for the first), so that a resumed run and an interrupted one agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ministral_jax.errors import ConfigError
from ministral_jax.parameters import ParameterSpec
from ministral_jax.stacked import LAYERS

Schedule = Literal["cosine", "linear", "constant", "onecycle"]
Decayed = Literal["matrices", "all"]
Parameters = Mapping[str, Array]

# Of torch.optim.lr_scheduler.OneCycleLR.
FIRST_DIVISOR, LAST_DIVISOR = 25.0, 1e4
BETA1_LOW, BETA1_HIGH = 0.85, 0.95


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and its schedule over `steps` steps; defaults are those of transformers' Trainer.

    "cosine" and "linear" rise in a straight line over `warmup_steps` from zero, which is the rate of the first of them,
    and fall to `final_share` of `learning_rate`; "constant" stays at that. "onecycle" is torch's OneCycleLR: a cosine
    from a 25th over `warmup_share` of the steps, another down to a 250,000th, and beta1 from 0.95 to 0.85 and back in
    place of `beta1`. Weights "matrices" decay, or "all", norms too. `clip_norm` bounds the norm of all gradients.
    """

    learning_rate: float
    steps: int
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    warmup_share: float = 0.05
    final_share: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decayed: Decayed = "matrices"
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        below_one = math.nextafter(1.0, 0.0)
        limits = {
            "learning_rate": (math.ulp(0.0), math.inf),
            "steps": (1, math.inf),
            "warmup_steps": (0, self.steps),
            "warmup_share": (0.0, 1.0),
            "final_share": (0.0, 1.0),
            "beta1": (0.0, below_one),
            "beta2": (0.0, below_one),
            "epsilon": (math.ulp(0.0), math.inf),
            "weight_decay": (0.0, math.inf),
            "clip_norm": (math.ulp(0.0), math.inf),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"{name}={value!r} is not allowed: expected a number from {least:g} to {most:g}")
        for name, allowed in (("schedule", get_args(Schedule)), ("decayed", get_args(Decayed))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: expected {' or '.join(allowed)}")

    def rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The learning rate of `step`, 0 for the first."""
        return SCHEDULES[self.schedule](self, step.astype(jnp.float32))

    def momentum(self, step: Int[Array, ""]) -> Float[Array, ""] | float:
        """beta1 of `step`."""
        if self.schedule != "onecycle":
            return self.beta1
        return one_cycle(self, step.astype(jnp.float32), BETA1_HIGH, BETA1_LOW, BETA1_HIGH)


def compat_config(
    *, learning_rate: float, steps: int, weight_decay: float, warmup_share: float, clip_norm: float
) -> OptimizerConfig:
    """What mistral-finetune runs with these values of its configuration."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        steps=steps,
        schedule="onecycle",
        warmup_share=warmup_share,
        beta2=0.95,
        weight_decay=weight_decay,
        decayed="all",
        clip_norm=clip_norm,
    )


def _bend(left: Array) -> Array:
    """A half cosine from 1 to 0, of the share that is `left`; as a square it keeps its digits towards the end."""
    return jnp.square(jnp.sin(0.5 * math.pi * left))


def _warm(config: OptimizerConfig, step: Array, after: Callable[[Array], Array]) -> Array:
    """The warm-up, and then `after` of the share of the remaining steps that is left; both as in transformers."""
    left = jnp.clip((config.steps - step) / max(1, config.steps - config.warmup_steps), 0.0, 1.0)
    factor = config.final_share + (1.0 - config.final_share) * after(left)
    return config.learning_rate * jnp.where(step < config.warmup_steps, step / max(1, config.warmup_steps), factor)


def _cosine(config: OptimizerConfig, step: Array) -> Array:
    return _warm(config, step, _bend)


def _linear(config: OptimizerConfig, step: Array) -> Array:
    return _warm(config, step, lambda left: left)


def _constant(config: OptimizerConfig, step: Array) -> Array:
    return _warm(config, step, jnp.ones_like)


def one_cycle(config: OptimizerConfig, step: Array, start: float, middle: float, end: float) -> Array:
    """A cosine from `start` to `middle` over the warm-up, another to `end`: OneCycleLR with anneal_strategy="cos"."""
    turn, last = config.warmup_share * config.steps - 1.0, config.steps - 1.0
    rising = middle + (start - middle) * _bend((turn - step) / (turn or 1.0))  # the peak itself, if without length
    falling = end + (middle - end) * _bend((last - step) / ((last - turn) or 1.0))
    return jnp.where(step <= turn, rising, falling)


def _one_cycle_rate(config: OptimizerConfig, step: Array) -> Array:
    top = config.learning_rate
    return one_cycle(config, step, top / FIRST_DIVISOR, top, top / FIRST_DIVISOR / LAST_DIVISOR)


SCHEDULES: Mapping[str, Callable[[OptimizerConfig, Array], Array]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "onecycle": _one_cycle_rate,
}


class Optimizer:
    """AdamW on parameters by name, all float32: moments, clipping, decay and rates of one configuration.

    `specs` are the trained parameters; their axes tell matrices from norms.
    """

    def __init__(self, config: OptimizerConfig, specs: Mapping[str, ParameterSpec]) -> None:
        self.config = config
        self._decayed = {
            name: config.decayed == "all" or sum(axis != LAYERS for axis in spec.axes) > 1
            for name, spec in specs.items()
        }

    def init(self, parameters: Parameters) -> optax.OptState:
        """Moments of zero."""
        return self._transformation(jnp.zeros((), jnp.int32)).init(dict(parameters))

    def update(
        self, gradients: Parameters, state: optax.OptState, parameters: Parameters, step: Int[Array, ""]
    ) -> tuple[dict[str, Array], optax.OptState]:
        """Parameters and moments after one step with float32 `gradients`."""
        updates, state = self._transformation(step).update(dict(gradients), state, dict(parameters))
        return optax.apply_updates(dict(parameters), updates), state  # pyright: ignore[reportReturnType]

    def _transformation(self, step: Int[Array, ""]) -> optax.GradientTransformation:
        config = self.config
        beta1 = config.momentum(step)
        return optax.chain(
            optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
            # As in torch, the bias of the first moment is corrected with the beta1 of this step, however it was before.
            optax.scale_by_adam(b1=beta1, b2=config.beta2, eps=config.epsilon),  # pyright: ignore[reportArgumentType]
            optax.add_decayed_weights(config.weight_decay, self._decayed),
            optax.scale(-config.rate(step)),  # pyright: ignore[reportArgumentType]
        )
