"""Latent attention and experts on eight simulated devices: prompts, decoded tokens and scores are those of one device.

A cache of latents has one key for all heads, which every device that has any of them keeps; sequences and their pages
are split along `data` and `expert`, heads along `tensor`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from infer.generate import Generator
from infer.sampling import SamplingParams
from infer.scoring import score
from ministral_jax.config import (
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    TemperatureConfig,
    YarnConfig,
)
from ministral_jax.parameters import fill, initialize, parameters
from ministral_jax.sharding.layout import layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.transformer import Transformer

ORIGINAL, NEW_TOKENS = 16, 6
CLOSE = 1e-5  # of the range
# Ragged, and past two original lengths of YaRN and of the attention temperature.
PROMPTS = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (41, 3, 18, 27, 9)]


def config() -> ModelConfig:
    """Large 3 in small: a dense layer, then experts and a shared one."""
    yarn = YarnConfig(factor=4.0, original_length=ORIGINAL, beta_fast=2.0, beta_slow=0.5)
    return ModelConfig(
        dim=32, n_layers=3, n_heads=8, n_kv_heads=8, head_dim=14, hidden_dim=48, vocab_size=96, norm_eps=1e-6,
        rope=RopeConfig(theta=100.0, yarn=yarn), windows=(None,) * 3, max_length=4 * ORIGINAL,
        temperature=TemperatureConfig(beta=0.5, original_length=ORIGINAL),
        moe=MoEConfig(n_experts=8, experts_per_token=3, expert_hidden_dim=32, n_shared_experts=1, first_dense_layers=1),
        latent=LatentAttentionConfig(q_rank=24, kv_rank=16, rope_head_dim=8, nope_head_dim=6, v_head_dim=10),
    )  # fmt: skip


@functools.cache
def one_device() -> Transformer:
    return initialize(Transformer(config()), jax.random.key(11), std=0.3)


def on_mesh(mesh: str) -> Transformer:
    arrays, layout = parameters(one_device()), layout_for(config(), make_mesh(mesh))
    model = Transformer(config(), layout=layout)
    return fill(model, lambda name, spec: jax.device_put(arrays[name], layout.placement(name, spec)))


class Answers(NamedTuple):
    """Greedy tokens of each prompt; of each token its log-probability, and those of the 20 best at its place."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    best: np.ndarray


def answers(model: Transformer) -> Answers:
    """Prompts in chunks, then token by token, all through the cache."""
    generator = Generator(model, page_size=4, prefill_chunk=16)
    found = generator.generate(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=20))
    return Answers(
        [one.ids for one in found],
        [[token.logprob for token in one.logprobs] for one in found],
        np.array([[value for _, value in token.top] for one in found for token in one.logprobs]),
    )


@functools.cache
def expected() -> Answers:
    return answers(one_device())


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "data=2,expert=2,tensor=2", "tensor=8"])
def test_tokens_and_log_probabilities_are_those_of_one_device(mesh: str) -> None:
    """Through the cache, absorbed; and by scoring, expanded, every answer behind its prompt."""
    model = on_mesh(mesh)
    found = answers(model)
    assert found.ids == expected().ids
    np.testing.assert_allclose(found.best, expected().best, rtol=0, atol=CLOSE * np.ptp(expected().best))
    for prompt, ids, logprobs in zip(PROMPTS[:2], found.ids, found.logprobs, strict=False):
        scored = score(model, [*prompt, *ids]).logprobs[len(prompt) :]
        np.testing.assert_allclose(scored, logprobs, rtol=0, atol=CLOSE * np.ptp(expected().best))
