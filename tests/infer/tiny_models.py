"""A tiny model with a full and a windowed layer, for tests of generation. Holds no tests."""

from __future__ import annotations

import functools

import jax
import numpy as np

from ministral_jax.config import ModelConfig, RopeConfig, TemperatureConfig
from ministral_jax.parameters import initialize
from ministral_jax.transformer import Transformer
from pallas_kernels.flash_attention import Implementation

MAX_LENGTH = 128


@functools.cache
def tiny_model(vocab_size: int = 314, attention: Implementation = "auto") -> Transformer:
    """Two layers, the second with a window of 6, and weights so wide that no answer is near a tie."""
    config = ModelConfig(
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        hidden_dim=24,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope=RopeConfig(theta=100.0),
        windows=(None, 6),
        max_length=MAX_LENGTH,
        temperature=TemperatureConfig(beta=0.3, original_length=16),
    )
    return initialize(Transformer(config, attention=attention), jax.random.key(3), std=0.3)


def random_prompts(*lengths: int, vocab_size: int = 314) -> list[list[int]]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]
