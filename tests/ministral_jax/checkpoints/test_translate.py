"""Names of the published architectures in both layouts, their counts and sizes, and names that are nobody's."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ministral_jax.checkpoints.conversion.expected import module_shape, modules
from ministral_jax.checkpoints.translate import (
    Name,
    fused_hf_name,
    hf_name,
    parse_fused,
    parse_hf,
    parse_mistral,
)
from ministral_jax.config_files import config_from_hf, config_from_params
from tests.published_configs import CONFIGS, PARAMS

# Tensors in all and in the text model, and parameters of the text model, as published.
PUBLISHED = {
    "mistral-7b-v0.1": (291, 291, 7_241_732_096),
    "mistral-7b-v0.3": (291, 291, 7_248_023_552),
    "mixtral-8x7b-v0.1": (995, 995, 46_702_792_704),
    "mixtral-8x22b-v0.3": (1739, 1739, 140_630_071_296),
    "ministral-8b-instruct-2410": (327, 327, 8_019_808_256),
    "ministral-3-3b-base-2512": (236 + 222, 236, 3_429_006_336),
    "ministral-3-8b-instruct-2512": (531, 309, 8_489_553_920),
    "ministral-3-14b-reasoning-2512": (585, 363, 13_506_073_600),
    "mistral-large-3-675b-base-2512": (23_065 + 438, 23_065, 673_421_089_792),
}
VISION = ("vision_", "pre_mm_", "patch_merger.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_totals_are_the_published_ones(name):
    config = config_from_params(PARAMS[name])
    skipped = {"output"} if config.tied_embeddings else set()
    found = [(module, shape) for module, shape in modules(config) if module not in skipped]
    text = [shape for module, shape in found if not module.startswith(VISION)]
    assert (len(found), len(text), sum(map(math.prod, text))) == PUBLISHED[name]


def test_the_vision_tower_has_the_published_size():
    config = config_from_params(PARAMS["ministral-3-8b-instruct-2512"])
    tower = [shape for module, shape in modules(config) if module.startswith("vision_encoder")]
    assert (len(tower), sum(map(math.prod, tower))) == (218, 403_305_472)


@pytest.mark.parametrize("name", [*PUBLISHED, "mistral-small-4-119b-instruct-2603"])
def test_every_name_of_every_model_goes_to_the_hf_layout_and_back(name):
    config = config_from_params(PARAMS[name]) if name in PARAMS else config_from_hf(CONFIGS[name])
    names = {Name(module, "weight") for module, _ in modules(config) if not re.search(r"experts\.[0-9]{2}", module)}
    assert all(parse_mistral(str(name)) == name for name in names)
    for wrapped in (False, True):
        theirs = {hf_name(name, wrapped=wrapped) for name in names}
        assert {parse_hf(name) for name in theirs} == names
        assert len(theirs) == len(names)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.3.attention.wq.qscale_weight", "model.layers.3.self_attn.q_proj.weight_scale_inv"),
        ("layers.3.feed_forward.w2.qscale_act", "model.layers.3.mlp.down_proj.activation_scale"),
        ("layers.3.attention.wk.weight_scale", "model.layers.3.self_attn.k_proj.weight_scale"),
        ("layers.0.feed_forward.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        ("layers.0.feed_forward.experts.7.w3.weight", "model.layers.0.block_sparse_moe.experts.7.w3.weight"),
        ("layers.9.gate.weight", "model.layers.9.mlp.gate.weight"),
        ("layers.9.shared_experts.w2.weight_packed", "model.layers.9.mlp.shared_experts.down_proj.weight_packed"),
        ("layers.9.experts.100.w1.weight_packed", "model.layers.9.mlp.experts.100.gate_proj.weight_packed"),
        ("layers.9.attention.wkv_a_with_mqa.weight", "model.layers.9.self_attn.kv_a_proj_with_mqa.weight"),
        ("layers.9.attention.kv_a_norm.weight", "model.layers.9.self_attn.kv_a_layernorm.weight"),
        ("vision_encoder.ln_pre.weight", "model.vision_tower.ln_pre.weight"),
        ("vision_language_adapter.w_out.bias", "model.multi_modal_projector.linear_2.bias"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_some_names_word_by_word(ours, theirs):
    name = parse_mistral(ours)
    assert name is not None
    assert hf_name(name, wrapped=False) == theirs
    assert parse_hf(theirs) == name


def test_fused_experts_are_named_after_their_layer():
    name = Name("layers.4.experts.2.w3", "weight")
    assert name.is_expert_of_fused
    assert fused_hf_name(name, wrapped=False) == "model.layers.4.mlp.experts.gate_up_proj"
    assert parse_fused("model.layers.4.mlp.experts.gate_up_proj") == ("layers.4", ("w1", "w3"), "weight")
    assert parse_fused("model.language_model.layers.4.mlp.experts.down_proj") == ("layers.4", ("w2",), "weight")
    scale = Name("layers.4.experts.2.w3", "qscale_weight")
    assert fused_hf_name(scale, wrapped=False) == "model.layers.4.mlp.experts.gate_up_proj_scale_inv"
    found = parse_fused("model.layers.4.mlp.experts.gate_up_proj_activation_scale")
    assert found == ("layers.4", ("w1", "w3"), "qscale_act")
    assert parse_fused("model.layers.4.mlp.experts.gate_up_proj_bias") is None
    assert parse_fused("model.layers.4.mlp.experts.0.down_proj.weight") is None
    assert not Name("layers.4.experts.2.w3", "weight_packed").is_expert_of_fused
    assert not Name("layers.4.feed_forward.experts.2.w3", "weight").is_expert_of_fused


@given(st.text(max_size=60) | st.from_regex(r"(model\.|layers\.|[0-9]+\.|attention\.|wq\.|#|experts\.|weight|\.){1,8}"))
def test_no_other_text_is_a_name_unless_it_is_written_back_the_same(text):
    ours, theirs = parse_mistral(text), parse_hf(text)
    assert ours is None or str(ours) == text
    if theirs is not None:
        assert parse_hf(hf_name(theirs, wrapped=False)) == theirs


def test_shapes_of_single_modules_are_those_of_the_list():
    config = config_from_params(PARAMS["mixtral-8x7b-v0.1"])
    listed = dict(modules(config))
    for module in ("layers.31.attention.wk", "layers.0.feed_forward.experts.7.w2", "layers.5.ffn_norm"):
        assert module_shape(module, config) == listed[module]
    for module in ("layers.32.attention.wk", "layers.0.feed_forward.experts.8.w2", "layers.0.feed_forward.w1", "norm"):
        assert module_shape(module, config) is None
