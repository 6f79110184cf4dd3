"""What the bundled model is and how it is trained: sizes, curriculum, optimiser. The loop is in pretrain.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

import jax
import optax

from ministral_jax.config import ModelConfig, RopeConfig

from .conversations import Stage
from .vocabulary import VOCABULARY_SIZE

WINDOW = 32
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Period:
    """A stretch of the curriculum: `steps` optimiser steps, each over rows of one of `stages`, drawn at random."""

    steps: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Recipe:
    """A training run, whole: everything that decides its result, besides the code and the machine's rounding."""

    config: ModelConfig
    curriculum: tuple[Period, ...]
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_steps: int = 700
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(period.steps for period in self.curriculum)

    def stage(self, step: int) -> Stage:
        """The stage whose rows step number `step` (from 0) sees; the same at every call."""
        for period in self.curriculum:
            if step < period.steps:
                return self.random(step, "stage").choice(period.stages)
            step -= period.steps
        raise ValueError(f"step {step} past the end of the curriculum")

    def random(self, step: int, purpose: str) -> random.Random:
        """The random numbers of one step: a function of the seed and the step alone, so that resuming is exact."""
        return random.Random(f"{self.seed}/{purpose}/{step}")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with a clipped gradient; warm-up, a constant rate, and a linear fall to nothing in the last steps.

        A constant rate lets a curriculum be prolonged without changing the steps already taken.
        """
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps),
                optax.constant_schedule(self.learning_rate),
                optax.linear_schedule(self.learning_rate, 0.0, self.decay_steps),
            ],
            [self.warmup_steps, self.steps - self.decay_steps],
        )
        decayed = optax.adamw(
            rate,
            b2=self.beta2,
            weight_decay=self.weight_decay,
            mask=lambda parameters: jax.tree.map(lambda array: array.ndim > 1, parameters),
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), decayed)


CONFIG = ModelConfig(
    dim=96,
    n_layers=8,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    hidden_dim=256,
    vocab_size=VOCABULARY_SIZE,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e5),
    windows=(None, WINDOW, WINDOW, WINDOW) * 2,
    max_length=MAX_LENGTH,
)

# Rows of a few facts and hardly any filler first, each fact asked for in turn: every answer is a lesson in finding
# a number by its label. Once that is learned, length is cheap to add.
FEW_FACTS = Stage(64, facts=(1, 2), questions=(1, 2), filler=(0.0, 0.3))
MORE_FACTS = Stage(96, facts=(2, 4), questions=(2, 4), filler=(0.0, 0.6))
SHORT = Stage(160, facts=(4, 4), questions=(3, 4), filler=(0.4, 1.0))
MIDDLE = Stage(256, facts=(4, 4), questions=(2, 4), filler=(0.4, 1.0))
LONG = Stage(512, facts=(4, 4), questions=(1, 4), filler=(0.4, 1.0))
LONGER = Stage(1024, facts=(4, 5), questions=(1, 4), filler=(0.4, 1.0))
LONGEST = Stage(2048, facts=(4, 5), questions=(2, 4), filler=(0.4, 1.0))

RECIPE = Recipe(
    config=CONFIG,
    curriculum=(
        Period(200, (FEW_FACTS,)),
        Period(400, (MORE_FACTS,)),
        Period(400, (SHORT,)),
        Period(350, (MIDDLE, LONG)),
        Period(450, (MIDDLE, LONG, LONGER, LONGEST)),
    ),
)
