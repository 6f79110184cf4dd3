"""Names in both layouts, what stays unread, and how the output head is decided on."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ministral_jax.checkpoints.layouts import HF_PREFIXES, hf_name, plan_reading, rotary_heads
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import LatentAttentionConfig, VisionConfig
from ministral_jax.config_files import write_config_json, write_params_json
from ministral_jax.errors import CheckpointError
from ministral_jax.parameters import parameter_specs, parameters
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import interleaved, layout_tensors, random_weights, tiny_config, write_tiny_checkpoint

TEXT_OF = {"mistral": ("consolidated.safetensors", "params.json"), "hf": ("model.safetensors", "config.json")}


def rewritten(directory: Path, layout: str, change) -> None:
    """Applies `change` to the tensors of the file in `directory`, in place."""
    path = directory / TEXT_OF[layout][0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_holds(model: Transformer, weights: dict[str, np.ndarray]) -> None:
    found = parameters(model)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(np.asarray(found[name]), values)


def test_hf_names_are_those_of_transformers():
    assert hf_name("tok_embeddings.weight") == "model.embed_tokens.weight"
    assert hf_name("layers.11.attention.wq.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert hf_name("layers.0.attention_norm.weight") == "model.layers.0.input_layernorm.weight"
    assert hf_name("layers.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    # w1 is the gate, w3 the other factor, w2 the way down.
    assert hf_name("layers.0.feed_forward.w1.weight") == "model.layers.0.mlp.gate_proj.weight"
    assert hf_name("layers.0.feed_forward.w2.weight") == "model.layers.0.mlp.down_proj.weight"
    assert hf_name("layers.0.feed_forward.w3.weight") == "model.layers.0.mlp.up_proj.weight"
    assert hf_name("norm.weight", "model.language_model.") == "model.language_model.norm.weight"


@pytest.mark.parametrize("prefix", HF_PREFIXES)
def test_each_prefix_of_the_hf_layout_loads(tmp_path, prefix):
    config = tiny_config("ministral")
    weights = write_tiny_checkpoint(tmp_path, config, "hf")
    save_file(layout_tensors(weights, config, "hf", prefix), tmp_path / "model.safetensors")
    assert_holds(load_model(tmp_path), weights)


def test_only_queries_and_keys_are_permuted_and_latent_ones_are_not():
    config = tiny_config()
    permuted = {name: rotary_heads(name, config) for name in parameter_specs(Transformer(config))}
    assert {name: heads for name, heads in permuted.items() if heads} == {
        f"layers.{i}.attention.{part}.weight": heads for i in range(3) for part, heads in (("wq", 4), ("wk", 2))
    }
    latent = LatentAttentionConfig(q_rank=8, kv_rank=8, rope_head_dim=8, nope_head_dim=8, v_head_dim=8)
    latent_config = dataclasses.replace(config, latent=latent, head_dim=16, n_kv_heads=4)
    assert rotary_heads("layers.0.attention.wq.weight", latent_config) is None


def test_the_layouts_differ_by_the_published_permutation():
    """Facts: `HF[h*d + c*d/2 + j] = mistral[h*d + 2j + c]`, here for two heads of four rows."""
    rows = np.arange(8.0).reshape(8, 1)
    assert interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


VISION = {
    "mistral": [
        "vision_encoder.patch_conv.weight",
        "vision_encoder.transformer.layers.0.attention.wq.weight",
        "patch_merger.merging_layer.weight",
        "vision_language_adapter.w_in.weight",
        "vision_language_adapter.w_in.bias",
        "pre_mm_projector_norm.weight",
    ],
    "hf": [
        "model.vision_tower.patch_conv.weight",
        "vision_tower.transformer.layers.0.attention.q_proj.weight",
        "model.multi_modal_projector.linear_1.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
    ],
}
BUFFERS = {
    "mistral": ["layers.0.attention.wk.fake_quantizer.qscale_act"],
    "hf": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_fake_quantizer.qscale_act"],
}


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_towers_and_buffers_are_left_alone_and_counted_in_one_line(tmp_path, caplog, layout):
    weights = write_tiny_checkpoint(tmp_path, tiny_config(), layout)
    extra = {name: np.ones(3, np.float32) for name in VISION[layout] + BUFFERS[layout]}
    rewritten(tmp_path, layout, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.INFO, "ministral_jax"):
        assert_holds(load_model(tmp_path), weights)
    lines = [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]
    assert len(lines) == 1
    counted = sum(int(part.split()[0]) for part in lines[0].split(": ", 2)[2].split(", "))
    assert counted == len(extra)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_model_with_vision_loads_as_its_text_decoder(tmp_path, layout):
    vision = VisionConfig(
        dim=32,
        n_layers=1,
        n_heads=2,
        hidden_dim=48,
        patch_size=4,
        image_size=56,
        spatial_merge_size=2,
        pre_projector_norm=True,
        patch_merge=True,
    )
    config = tiny_config("ministral3", vision=vision)
    weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral3"), layout)
    (tmp_path / TEXT_OF[layout][1]).unlink()
    if layout == "mistral":
        write_params_json(config, tmp_path / "params.json")
    else:
        write_config_json(config, tmp_path / "config.json")
        tensors = layout_tensors(weights, config, "hf", "model.language_model.")
        save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(load_model(tmp_path), weights)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
class TestTheOutputHead:
    def head(self, layout: str) -> str:
        return "output.weight" if layout == "mistral" else "lm_head.weight"

    def test_absent_and_tied_is_the_embeddings(self, tmp_path, layout):
        weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral3_tied"), layout)
        model = load_model(tmp_path)
        assert model.output is None
        assert_holds(model, weights)

    def test_present_and_equal_to_tied_embeddings_is_not_kept_twice(self, tmp_path, layout):
        weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral3_tied"), layout)
        copy = {self.head(layout): weights["tok_embeddings.weight"]}
        rewritten(tmp_path, layout, lambda tensors: tensors.update(copy))
        assert_holds(load_model(tmp_path), weights)

    def test_present_and_different_wins_over_a_config_that_ties_in_one_line(self, tmp_path, caplog, layout):
        weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral3_tied"), layout)
        other = weights["tok_embeddings.weight"].copy()
        other[-1, -1] += 1
        rewritten(tmp_path, layout, lambda tensors: tensors.update({self.head(layout): other}))
        with caplog.at_level(logging.WARNING, "ministral_jax"):
            model = load_model(tmp_path)
        assert_holds(model, weights | {"output.weight": other})
        assert not model.config.tied_embeddings
        assert [record.getMessage().count("\n") for record in caplog.records if "both are kept" in record.message] == [
            0
        ]

    def test_absent_and_untied_is_an_error(self, tmp_path, layout):
        write_tiny_checkpoint(tmp_path, tiny_config("ministral3"), layout)
        rewritten(tmp_path, layout, lambda tensors: tensors.pop(self.head(layout)))
        with pytest.raises(CheckpointError, match="no output head"):
            load_model(tmp_path)

    def test_misshapen_is_an_error_even_when_tied(self, tmp_path, layout):
        write_tiny_checkpoint(tmp_path, tiny_config("ministral3_tied"), layout)
        wrong = {self.head(layout): np.ones((5, 64), np.float32)}
        rewritten(tmp_path, layout, lambda tensors: tensors.update(wrong))
        with pytest.raises(CheckpointError, match=r"has shape \[5, 64\], expected \[128, 64\]"):
            load_model(tmp_path)


def test_the_older_spelling_of_the_head_is_read():
    config = tiny_config()
    names = layout_tensors(random_weights(config), config, "hf", "language_model.model.")
    plan = plan_reading(list(parameter_specs(Transformer(config))), names, config, "hf")
    assert plan.head is not None
    assert plan.head.name == "language_model.lm_head.weight"
    assert not plan.missing
    assert not plan.extra
