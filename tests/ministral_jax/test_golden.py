"""Loaded checkpoints, in both layouts, against the answers of transformers on the same weights (tests/golden)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import ministral_jax
from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax.parameters import parameters
from tests.golden.models import MODELS, GoldenModel, by_name, hf_weights, token_ids
from tests.golden.values import CLOSE, FOLDER, golden_values, write_hf, write_native


def all_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    graph, weights = nnx.split(model)
    return np.asarray(jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, tokens))


@pytest.mark.parametrize("golden", MODELS, ids=lambda golden: golden.name)
def test_logits_of_both_layouts_are_transformers(golden: GoldenModel, tmp_path: Path) -> None:
    """All logits of sequences many windows long; the mistral layout gives the very same model."""
    expected = golden_values(golden)
    model = ministral_jax.load(write_hf(golden, tmp_path / "hf"))
    difference = np.abs(all_logits(model, token_ids(golden)) - expected.logits).max()
    assert difference <= CLOSE * expected.range

    native = ministral_jax.load(write_native(golden, tmp_path / "native"))
    assert dataclasses.replace(native.config, extra={}) == dataclasses.replace(model.config, extra={})
    weights = parameters(model)
    for name, weight in parameters(native).items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)


@pytest.mark.parametrize("name", ["ministral", "ministral3_tied", "mixtral", "mistral4"])
def test_greedy_continuations_are_transformers(name: str, tmp_path: Path) -> None:
    golden = by_name(name)
    expected = golden_values(golden)
    generator = Generator(
        ministral_jax.load(write_native(golden, tmp_path)), page_size=4, prefill_chunk=16, max_length=128
    )
    found = generator.generate(expected.prompts.tolist(), SamplingParams(max_tokens=expected.greedy.shape[1]))
    assert [list(completion.ids) for completion in found] == expected.greedy.tolist()


@pytest.mark.parametrize("era", ["new", "old"])
def test_a_text_decoder_inside_a_vision_model_is_the_same_decoder(era: str, tmp_path: Path) -> None:
    """Mistral3ForConditionalGeneration names, as since transformers 4.52 and as before."""
    golden = by_name("ministral3")
    text = json.loads((FOLDER / "ministral3.config.json").read_text())
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "head_dim": 16, "image_size": 56, "patch_size": 4, "num_channels": 3,
              "hidden_act": "silu"}  # fmt: skip
    outer = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "wrapped" / "config.json").write_text(json.dumps(outer))
    save_file(
        {prefixed(name, era): w for name, w in hf_weights(golden).items()}, tmp_path / "wrapped/model.safetensors"
    )
    wrapped, plain = ministral_jax.load(tmp_path / "wrapped"), ministral_jax.load(write_native(golden, tmp_path / "p"))
    assert dataclasses.replace(wrapped.config, vision=None, extra={}) == dataclasses.replace(plain.config, extra={})
    weights = parameters(plain)
    assert weights.keys() == parameters(wrapped).keys()
    for name, weight in parameters(wrapped).items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)


def prefixed(name: str, era: str) -> str:
    if era == "old":
        return f"language_model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
