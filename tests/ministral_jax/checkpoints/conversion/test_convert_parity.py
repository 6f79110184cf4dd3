"""transformers loads what conversion writes, bf16 and quantised, with nothing missing, and answers as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import ministral_jax
from ministral_jax.checkpoints.conversion.convert import convert
from tests.architecture_files import EXAMPLES, VISION, write_example

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # what other libraries warn about is not ours to fix
]

# Of the range of the logits.
CLOSE = 1e-4
TOKENS = np.arange(3, 33)[None] % 128

TEXT = {
    "mistral": "MistralForCausalLM",
    "mistral_window": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "ministral3_tied": "Ministral3ForCausalLM",
    "wide_heads": "MistralForCausalLM",
}
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128, "intermediate_size": 96,
}  # fmt: skip


def loaded(class_name: str, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    loader = getattr(transformers, class_name)
    model, report = loader.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.float()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", TEXT)
def test_what_we_convert_from_mistral_answers_in_transformers_as_here(tmp_path, name):
    write_example(tmp_path / "a", EXAMPLES[name](), "mistral")
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    model = loaded(TEXT[name], tmp_path / "b")
    assert str(model.dtype) == "torch.bfloat16"
    theirs = logits(model)
    ours = ministral_jax.load(tmp_path / "a", dtype="float32")
    graph, weights = nnx.split(ours)
    found = np.asarray(jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, TOKENS))
    assert np.abs(found - theirs).max() <= CLOSE * np.ptp(theirs)


def saved_by_transformers(name: str, folder: Path) -> tuple[str, Any]:
    """A random model of transformers, saved; its class and itself."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    if name == "mixtral":
        config = transformers.MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4, head_dim=16)
    elif name == "small_4":
        config = transformers.Mistral4Config(
            **_SMALL, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            q_lora_rank=40, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_shared_experts=1,
            first_k_dense_replace=0,
        )  # fmt: skip
    else:
        text = transformers.Ministral3Config(**_SMALL, num_key_value_heads=2, head_dim=16)
        vision = transformers.PixtralVisionConfig(
            hidden_size=VISION.dim, intermediate_size=VISION.hidden_dim, num_hidden_layers=2, num_attention_heads=2,
            image_size=VISION.image_size, patch_size=VISION.patch_size, hidden_act="silu",
        )  # fmt: skip
        config = transformers.Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=2,
            multimodal_projector_bias=False, vision_feature_layer=-1, tie_word_embeddings=False,
        )  # fmt: skip
    class_name = {"mixtral": "MixtralForCausalLM", "small_4": "Mistral4ForCausalLM"}.get(
        name, "Mistral3ForConditionalGeneration"
    )
    model = getattr(transformers, class_name)(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return class_name, model.eval()


@pytest.mark.parametrize("name", ["mixtral", "small_4", "vision"])
def test_what_transformers_saved_comes_back_through_the_mistral_layout_to_the_bit(tmp_path, name):
    class_name, original = saved_by_transformers(name, tmp_path / "a")
    expected = {key: value.clone() for key, value in original.state_dict().items()}
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    again = loaded(class_name, tmp_path / "c")
    found = again.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].equal(value), key
    # The original's own buffers were rounded to bfloat16 with it; loaded again, they are as any loaded model's.
    np.testing.assert_array_equal(logits(again), logits(loaded(class_name, tmp_path / "a")))


def test_transformers_dequantises_our_fp8_to_weight_times_scale(tmp_path):
    """Static per-tensor FP8 from the mistral layout: transformers on CPU multiplies it out when it loads."""
    torch = pytest.importorskip("torch")
    example = EXAMPLES["vision_fp8"]()
    write_example(tmp_path / "a", example, "mistral")
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    model = loaded("Mistral3ForConditionalGeneration", tmp_path / "b")
    weight = model.model.language_model.layers[1].self_attn.q_proj.weight.float()
    name = "layers.1.attention.wq"
    scale = np.float32(example.tensors[f"{name}.qscale_weight"])
    expected = example.tensors[f"{name}.weight"].astype(np.float32) * scale
    torch.testing.assert_close(weight, torch.tensor(expected).bfloat16().float(), rtol=0, atol=0)
