"""ModelConfig refuses what describes no model, by name, however it was made."""

import dataclasses
import math
from typing import Any

import pytest

from ministral_jax.config import (
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    TemperatureConfig,
    VisionConfig,
    YarnConfig,
)
from ministral_jax.errors import ConfigError

CONFIG = ModelConfig(
    dim=48,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=80,
    vocab_size=96,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
    windows=(None, 32, 32, 7),
    max_length=256,
)
LATENT = LatentAttentionConfig(q_rank=8, kv_rank=8, rope_head_dim=4, nope_head_dim=12, v_head_dim=8)
MOE = MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=16)
YARN = YarnConfig(factor=4.0, original_length=64)
VISION = VisionConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, patch_size=4, image_size=56)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (CONFIG, {"dim": 0}, r"dim=0 is not allowed: expected a positive integer below 2\*\*31"),
        (CONFIG, {"vocab_size": 2**31}, "vocab_size=2147483648"),
        (CONFIG, {"n_heads": True}, "n_heads=True"),
        (CONFIG, {"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
        (CONFIG, {"head_dim": 15}, "head_dim=15"),
        (CONFIG, {"norm_eps": 0.0}, r"norm_eps=0\.0"),
        (CONFIG, {"norm_eps": math.nan}, "norm_eps=nan"),
        (CONFIG, {"windows": (None,) * 3}, "windows has 3 entries, expected one for each of n_layers=4"),
        (CONFIG, {"windows": (None, 4, 0, 4)}, r"windows\[2\]=0"),
        (CONFIG, {"windows": (None, 4, 4, 2**31)}, r"windows\[3\]=2147483648"),
        (CONFIG, {"latent": LATENT, "head_dim": 18}, "head_dim=18 is not qk_nope_head_dim=12"),
        (CONFIG, {"moe": dataclasses.replace(MOE, first_dense_layers=5)}, "first_dense_layers=5"),
        (LATENT, {"rope_head_dim": 5}, "qk_rope_head_dim=5"),
        (MOE, {"experts_per_token": 9}, "experts_per_token=9 is not allowed: expected at most n_experts=8"),
        (MOE, {"n_shared_experts": -1}, "n_shared_experts=-1"),
        (RopeConfig(theta=1e4), {"theta": 1.0}, r"rope_theta=1\.0"),
        (RopeConfig(theta=1e4), {"theta": math.inf}, "theta=inf"),
        (YARN, {"factor": 0.5}, r"yarn\.factor=0\.5"),
        (YARN, {"beta_slow": 1e-320}, "beta_slow=1e-320"),
        (YARN, {"beta_fast": 1e300}, r"beta_fast=1e\+300"),
        (YARN, {"beta_fast": 0.5}, r"yarn\.beta_fast=0\.5 is not allowed: expected at least beta_slow=1\.0"),
        (TemperatureConfig(beta=0.1, original_length=8), {"beta": 0.0}, r"beta=0\.0"),
        (VISION, {"n_heads": 3}, "vision hidden size=32"),
        (VISION, {"spatial_merge_size": 2}, "spatial_merge_size=2 without patch_merge"),
    ],
)
def test_a_value_that_describes_no_model_is_refused_by_name(part: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        dataclasses.replace(part, **change)
    assert "\n" not in str(caught.value)


def test_layers_are_grouped_by_window_in_order_of_appearance() -> None:
    assert CONFIG.window_groups == ((None, (0,)), (32, (1, 2)), (7, (3,)))
    assert CONFIG.with_windows(None, 5).window_groups == ((None, (0, 2)), (5, (1, 3)))


@pytest.mark.parametrize("pattern", [(), (None, 4, 4)])
def test_a_window_pattern_must_tile_the_layers(pattern: tuple[int | None, ...]) -> None:
    with pytest.raises(ConfigError, match="does not tile n_layers=4"):
        CONFIG.with_windows(*pattern)


def test_configs_are_equal_and_hash_alike_whatever_file_they_came_from() -> None:
    other = dataclasses.replace(CONFIG, extra={"mistral": {"dim": 48, "note": "x"}})
    assert other == CONFIG
    assert hash(other) == hash(CONFIG)
    assert dataclasses.replace(CONFIG, dim=64) != CONFIG
