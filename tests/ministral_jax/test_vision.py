"""The vision tower and its adapter against the answers of transformers (tests/golden), and how they are loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ministral_jax
from infer.images import ImageReader, prompt_rows, text_alone
from ministral_jax import lora
from ministral_jax.checkpoints.layouts import rotary_heads
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.config import LatentAttentionConfig, VisionConfig
from ministral_jax.errors import CheckpointError, ConfigError
from ministral_jax.parameters import parameters
from ministral_jax.patches import FEWEST_PATCHES, pack_images, padded_patches
from ministral_jax.transformer import Transformer
from ministral_jax.vision import rotation_2d
from tests.architecture_files import EXAMPLES, write_example
from tests.checkpoint_files import tiny_config
from tests.golden.values import CLOSE
from tests.golden.vision_models import (
    case_ids,
    case_images,
    golden_vision_logits,
    vision_by_name,
    write_vision_hf,
    write_vision_native,
)
from tests.ministral_jax.paged_runner import jitted

GOLDEN = vision_by_name("vision")
LENGTH = 64  # of every sequence here, padded: one program for all


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {"hf": write_vision_hf(GOLDEN, root / "hf"), "mistral": write_vision_native(GOLDEN, root / "mistral")}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Transformer:
    return ministral_jax.load(folders["mistral"])


@pytest.fixture(scope="module")
def reader(model: Transformer) -> ImageReader:
    vision = model.vision
    assert vision is not None
    return ImageReader(vision, None)


def assert_same_weights(one: Any, other: Any) -> None:
    weights = parameters(one)
    assert weights.keys() == parameters(other).keys()
    for name, weight in parameters(other).items():
        np.testing.assert_array_equal(weight, weights[name], err_msg=name)


def all_logits(model: Transformer, tokens: Any, images: Any) -> Any:
    return model.logits(model.hidden(tokens, images=images))


def test_logits_of_prompts_with_images_are_transformers(model: Transformer) -> None:
    """One image, and three of different sizes, with text before, between and after them."""
    run = jitted(text_alone(model), all_logits)
    for case, expected in golden_vision_logits(GOLDEN).items():
        ids = case_ids(GOLDEN, case)
        padded = np.pad(ids, (0, LENGTH - len(ids)))[None]
        found = run(padded, prompt_rows(model, ids.tolist(), case_images(case), LENGTH))[0, : len(ids)]
        assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected), case


def test_both_layouts_give_the_same_model(folders: dict[str, Path], model: Transformer) -> None:
    """Queries and keys of the tower lie in another order in each; older files lack the outer prefix of names."""
    assert_same_weights(ministral_jax.load(folders["hf"]), model)
    old = folders["hf"].parent / "old"
    old.mkdir()
    (old / "config.json").write_text((folders["hf"] / "config.json").read_text())
    weights = load_file(folders["hf"] / "model.safetensors")
    save_file({old_name(name): weight for name, weight in weights.items()}, old / "model.safetensors")
    assert_same_weights(ministral_jax.load(old), model)


def old_name(name: str) -> str:
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")


def test_images_that_are_read_together_do_not_see_each_other(reader: ImageReader) -> None:
    together = reader.rows(case_images("three"))
    assert [len(rows) for rows in together] == [2 * 3, 5 * 1, 1 * 7]
    for image, rows in zip(case_images("three"), together, strict=True):
        alone = ImageReader.rows(fresh(reader), [image])[0]
        np.testing.assert_allclose(rows, alone, rtol=0, atol=1e-5 * np.ptp(alone))


def fresh(reader: ImageReader) -> ImageReader:
    """The same reader with nothing kept."""
    other = object.__new__(ImageReader)
    other.__dict__ |= reader.__dict__ | {"_kept": type(reader._kept)()}
    return other


def test_an_image_is_not_the_same_with_two_of_its_rows_exchanged(reader: ImageReader) -> None:
    """What a patch shows counts for itself and, by its place, for all others."""
    (image,) = case_images("one")
    other = image.copy()
    other[:, :8], other[:, 8:16] = image[:, 8:16], image[:, :8]
    before, after = reader.rows([image])[0], reader.rows([other])[0]
    assert np.abs(before[-2:] - after[-2:]).max() > 1e-3 * np.ptp(before)


def test_another_size_runs_the_same_program(reader: ImageReader) -> None:
    rng = np.random.default_rng(0)
    for size in ((8, 8), (56, 56), (16, 48), (40, 24)):
        reader.rows([rng.standard_normal((3, *size)).astype(np.float32)])
    assert reader._run._cache_size() == 1


def test_an_image_that_was_read_is_not_read_again(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    images = case_images("three")
    before = reader.rows([images[0], images[2], images[0]])
    monkeypatch.setattr(reader, "_run", None)
    after = reader.rows([images[2], images[0]])
    np.testing.assert_array_equal(before[1], after[0])
    np.testing.assert_array_equal(before[2], after[1])


def test_many_images_go_in_several_rows_of_patches() -> None:
    config = dataclasses.replace(tower(), patch_size=2, image_size=256)
    image = np.zeros((3, 160, 160), np.float32)  # 6400 patches
    packed = list(pack_images([image] * 5, config))
    assert [part.tokens for part in packed] == [(1600, 1600), (1600, 1600), (1600,)]
    assert [len(part.patches.pixels) for part in packed] == [16384, 16384, 8192]


def tower() -> VisionConfig:
    return VisionConfig(
        dim=8, n_layers=1, n_heads=2, hidden_dim=8, patch_size=4, image_size=56, patch_merge=True, spatial_merge_size=2
    )


def test_buckets_hold_whole_tokens_and_at_most_half_as_much_padding_as_patches() -> None:
    sizes = [padded_patches(n, tower()) for n in range(4, 20000, 4)]
    assert all(size >= n and size % 4 == 0 for n, size in zip(range(4, 20000, 4), sizes, strict=True))
    assert all(size <= max(1.5 * n, FEWEST_PATCHES) for n, size in zip(range(4, 20000, 4), sizes, strict=True))
    assert len(set(sizes)) == 14


def test_rows_turn_half_of_the_pairs_and_columns_the_other_half() -> None:
    cos, sin = rotation_2d(jnp.array([[0, 0], [3, 0], [0, 5]]), 10000.0, 8)
    np.testing.assert_array_equal(cos[0], np.ones(4))
    np.testing.assert_allclose(sin[1], np.sin([3.0, 3 * 10000 ** (-4 / 8), 0, 0]), atol=1e-6)
    np.testing.assert_allclose(sin[2], np.sin([0, 0, 5 * 10000 ** (-2 / 8), 5 * 10000 ** (-6 / 8)]), atol=1e-6)


def test_a_tower_whose_heads_are_odd_is_refused() -> None:
    with pytest.raises(ConfigError, match="vision hidden size=6 is not allowed: expected an even number"):
        dataclasses.replace(tower(), dim=6)


def test_without_vision_the_text_decoder_is_the_same(folders: dict[str, Path], model: Transformer) -> None:
    for folder in folders.values():
        text = ministral_jax.load(folder, vision=False)
        assert text.vision is None
        assert text.config.vision is None
        assert_same_weights(text, text_alone(model))


def test_a_file_without_a_tower_is_read_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_vision_native(GOLDEN, tmp_path)
    file = tmp_path / "consolidated.safetensors"
    save_file(
        {name: w for name, w in load_file(file).items() if name.startswith(("layers", "norm", "tok", "out"))}, file
    )
    with caplog.at_level(logging.WARNING, "ministral_jax"):
        assert ministral_jax.load(tmp_path).vision is None
    assert "no vision tensors" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("patch_merger.merging_layer.weight"), "tensor 'patch_merger.merging_layer.weight' is missing"),
        (lambda w: w.update({"vision_encoder.transformer.layers.2.ffn_norm.weight": np.ones(32, np.float32)}),
         "tensor 'vision_encoder.transformer.layers.2.ffn_norm.weight' is not part of the model"),
        (lambda w: w.update({"vision_encoder.ln_pre.weight": np.ones(31, np.float32)}), r"has shape \[31\]"),
    ],
    ids=["missing", "another layer", "shape"],
)  # fmt: skip
def test_a_tower_that_does_not_fit_its_config_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_vision_native(GOLDEN, tmp_path)
    weights = load_file(tmp_path / "consolidated.safetensors")
    change(weights)
    save_file(weights, tmp_path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=message):
        ministral_jax.load(tmp_path)


@pytest.mark.parametrize("save", [save_hf, save_mistral])
def test_what_is_saved_is_the_checkpoint_that_was_read(
    save: Any, folders: dict[str, Path], model: Transformer, tmp_path: Path
) -> None:
    save(tmp_path, parameters(model), model.config)
    original = folders["hf" if save is save_hf else "mistral"]
    (name,) = (path.name for path in original.glob("*.safetensors"))
    saved, expected = load_file(tmp_path / name), load_file(original / name)
    assert saved.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_array_equal(saved[tensor], values, err_msg=tensor)
    assert ministral_jax.load(tmp_path).config.vision == model.config.vision


def test_the_tower_of_a_quantised_model_stays_dense_and_gets_no_adapters(tmp_path: Path) -> None:
    write_example(tmp_path / "fp8", EXAMPLES["vision_fp8"](), "mistral")
    model = ministral_jax.load(tmp_path / "fp8")
    lora.attach(model, lora.LoraConfig(rank=2))
    assert model.vision_encoder is not None
    block = model.vision_encoder.transformer.layers[0]
    assert model.layers[0].attention.wq.stored is not None
    assert block.attention.wq.stored is None
    adapted = lora.adapted(model)
    assert "layers.0.attention.wq" in adapted
    assert not [name for name in adapted if not name.startswith("layers.")]


def test_the_tower_beside_latent_attention_has_its_rows_reordered_all_the_same() -> None:
    latent = LatentAttentionConfig(q_rank=8, kv_rank=8, rope_head_dim=8, nope_head_dim=8, v_head_dim=8)
    config = tiny_config("ministral3", latent=latent, head_dim=16, n_kv_heads=4, vision=tower())
    assert rotary_heads("layers.0.attention.wq.weight", config) is None
    assert rotary_heads("vision_encoder.transformer.layers.0.attention.wk.weight", config) == tower().n_heads
    assert rotary_heads("vision_encoder.transformer.layers.0.attention.wv.weight", config) is None


def test_a_mesh_reads_images_as_one_device_does(folders: dict[str, Path], reader: ImageReader) -> None:
    """Every device has the whole tower, whatever the decoder is split over."""
    model = ministral_jax.load(folders["mistral"], mesh="fsdp=2,tensor=2")
    vision = model.vision
    assert vision is not None
    assert model.layout is not None
    assert len(jax.tree.leaves(parameters(model))[0].sharding.device_set) == 4
    for found, expected in zip(
        ImageReader(vision, model.layout).rows(case_images("three")), reader.rows(case_images("three")), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
