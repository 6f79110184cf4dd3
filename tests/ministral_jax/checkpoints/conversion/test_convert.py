"""Conversion between layouts: every tensor to the byte, every config key, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.conversion.compare import compare
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.opening import open_checkpoint
from ministral_jax.errors import CheckpointError
from tests.architecture_files import (
    EXAMPLES,
    LARGE_3,
    Tensors,
    hf_tensors,
    make,
    mistral_tensors,
    read_file,
    write_example,
)
from tests.checkpoint_files import tiny_config

WEIGHTS = {"mistral": "consolidated.safetensors", "hf": "model.safetensors"}
CONFIG = {"mistral": "params.json", "hf": "config.json"}
UNKNOWN: dict[str, Any] = {"trained_by": {"whom": ["us", 1]}, "expert_parallel": 1, "notes": None}


def tensors_of(folder: Path) -> Tensors:
    return {name: values for file in folder.glob("*.safetensors") for name, values in read_file(file).items()}


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name


def document(folder: Path, layout: str) -> dict[str, Any]:
    return json.loads((folder / CONFIG[layout]).read_text())


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_architecture_goes_from_mistral_to_hf_and_back_byte_by_byte(tmp_path, name):
    example = EXAMPLES[name]()
    written = write_example(tmp_path / "a", example, "mistral", UNKNOWN)
    convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert_same_tensors(tensors_of(tmp_path / "b"), hf_tensors(example))
    convert(tmp_path / "b", tmp_path / "c", to="mistral")
    assert_same_tensors(tensors_of(tmp_path / "c"), written)
    assert document(tmp_path / "c", "mistral") == document(tmp_path / "a", "mistral")


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_architecture_goes_from_hf_to_mistral_and_back_byte_by_byte(tmp_path, name):
    example = EXAMPLES[name]()
    written = write_example(tmp_path / "a", example, "hf", UNKNOWN)
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    assert_same_tensors(tensors_of(tmp_path / "b"), mistral_tensors(example))
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    assert_same_tensors(tensors_of(tmp_path / "c"), written)
    assert document(tmp_path / "c", "hf") == document(tmp_path / "a", "hf")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_older_prefixes_of_the_hf_layout_are_read(tmp_path, prefix):
    example = EXAMPLES["vision"]()
    tensors = write_example(tmp_path / "a", example, "hf")
    older = {
        name.replace("model.language_model.", prefix).replace("model.vision", "vision").replace("model.multi", "multi")
        if "lm_head" not in name else f"language_model.{name}": values
        for name, values in tensors.items()
    }  # fmt: skip
    save_file(older, tmp_path / "a" / WEIGHTS["hf"])
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    assert_same_tensors(tensors_of(tmp_path / "b"), mistral_tensors(example))


def test_a_tied_head_stays_absent_and_a_present_one_present(tmp_path):
    example = EXAMPLES["ministral3_tied"]()
    write_example(tmp_path / "absent", example, "mistral")
    convert(tmp_path / "absent", tmp_path / "absent_hf", to="hf")
    assert "lm_head.weight" not in tensors_of(tmp_path / "absent_hf")
    example.tensors["output.weight"] = example.tensors["tok_embeddings.weight"]
    write_example(tmp_path / "present", example, "mistral")
    convert(tmp_path / "present", tmp_path / "present_hf", to="hf")
    assert "lm_head.weight" in tensors_of(tmp_path / "present_hf")


def test_large_3_has_no_hf_form_and_goes_elsewhere(tmp_path):
    example = make(LARGE_3)
    written = write_example(tmp_path / "a", example, "mistral")
    with pytest.raises(CheckpointError, match=r"Large 3 has no HF form.*expected --to mistral or --to orbax"):
        convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    convert(tmp_path / "a", tmp_path / "c", to="mistral", max_shard_bytes=50_000)
    assert_same_tensors(tensors_of(tmp_path / "c"), written)


def test_projections_of_an_expert_with_two_scales_are_not_fused(tmp_path):
    from tests.architecture_files import SMALL_4, fp8_static

    config = dataclasses.replace(SMALL_4, quantization=EXAMPLES["vision_fp8"]().config.quantization)
    write_example(tmp_path / "a", make(config, fp8_static), "mistral")
    with pytest.raises(CheckpointError, match=r"'layers\.0\.experts\.0\.w3\.qscale_\w+' is .*one scale for both"):
        convert(tmp_path / "a", tmp_path / "b", to="hf")


def test_blocks_of_rows_that_a_head_spans_are_refused(tmp_path):
    from tests.architecture_files import fp8_block

    wide = tiny_config("mistral", head_dim=256, n_heads=2, n_kv_heads=1, n_layers=1)
    config = dataclasses.replace(wide, quantization=EXAMPLES["fp8_block"]().config.quantization)
    write_example(tmp_path / "a", make(config, fp8_block), "mistral")
    with pytest.raises(
        CheckpointError, match=r"'layers\.0\.attention\.wq\.weight_scale' .*span its blocks of 128 rows"
    ):
        convert(tmp_path / "a", tmp_path / "b", to="hf")


def test_computed_buffers_and_cache_quantizers_are_left_behind_and_counted(tmp_path):
    tensors = write_example(tmp_path / "a", EXAMPLES["mistral"](), "mistral")
    extra = {
        "layers.0.attention.k_fake_quantizer.qscale_act": np.zeros((), np.float32),
        "layers.0.attention.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }
    save_file(tensors | extra, tmp_path / "a" / WEIGHTS["mistral"])
    report = convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert report.dropped == {"fake quantizer": 1, "rotary buffer": 1}
    assert_same_tensors(tensors_of(tmp_path / "b"), hf_tensors(EXAMPLES["mistral"]()))


class TestFiles:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        write_example(tmp_path / "a", EXAMPLES["ministral"](), "mistral")
        (tmp_path / "a" / "tekken.json").write_text('{"a": 1}')
        (tmp_path / "a" / "generation_config.json").write_text("{}")
        (tmp_path / "a" / "SYSTEM_PROMPT.txt").write_text("be kind")
        (tmp_path / "a" / "unrelated.bin").write_bytes(b"x")
        return tmp_path / "a"

    def test_tokenizer_and_small_files_come_along_and_others_do_not(self, source, tmp_path):
        convert(source, tmp_path / "b", to="hf")
        names = {path.name for path in (tmp_path / "b").iterdir()}
        assert names == {
            "config.json", "model.safetensors", "conversion.json", "tekken.json", "generation_config.json",
            "SYSTEM_PROMPT.txt",
        }  # fmt: skip
        assert (tmp_path / "b" / "tekken.json").read_text() == '{"a": 1}'

    def test_the_manifest_has_the_checksum_of_every_other_file(self, source, tmp_path):
        import hashlib

        convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000)
        files = json.loads((tmp_path / "b" / "conversion.json").read_text())["files"]
        assert len(files) > 5
        assert files.keys() == {path.name for path in (tmp_path / "b").iterdir()} - {"conversion.json"}
        for name, record in files.items():
            raw = (tmp_path / "b" / name).read_bytes()
            assert record == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    @pytest.mark.parametrize("to", ["mistral", "hf"])
    def test_numbered_files_hold_no_more_than_asked_and_their_index_fits(self, source, tmp_path, to):
        convert(source, tmp_path / "b", to=to, max_shard_bytes=40_000, verify=True)
        stem = WEIGHTS[to].removesuffix(".safetensors")
        index = json.loads((tmp_path / "b" / f"{stem}.safetensors.index.json").read_text())
        tensors = tensors_of(tmp_path / "b")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
        for path in (tmp_path / "b").glob("*.safetensors"):
            held = read_file(path)
            assert sum(values.nbytes for values in held.values()) <= 40_000 or len(held) == 1
            assert all(index["weight_map"][name] == path.name for name in held)

    def test_the_same_conversion_writes_the_same_bytes(self, source, tmp_path):
        for target in ("b", "c"):
            convert(source, tmp_path / target, to="hf", max_shard_bytes=40_000)
        contents = [{path.name: path.read_bytes() for path in (tmp_path / t).iterdir()} for t in ("b", "c")]
        assert contents[0] == contents[1]

    def test_a_dry_run_tells_names_and_sizes_and_writes_nothing(self, source, tmp_path):
        plan = convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000, dry_run=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        done = convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000)
        assert plan == done
        assert all((tmp_path / "b" / name).stat().st_size == size for name, size in plan.files.items())

    def test_what_is_there_is_replaced_only_by_force_and_only_a_checkpoint(self, source, tmp_path):
        convert(source, tmp_path / "b", to="hf")
        with pytest.raises(CheckpointError, match="b: exists; expected a new name, or --force"):
            convert(source, tmp_path / "b", to="mistral")
        convert(source, tmp_path / "b", to="mistral", force=True)
        assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".json", ".safetensors", ".txt"}
        assert not (tmp_path / "b" / "config.json").exists()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years")
        with pytest.raises(CheckpointError, match="mine: is no checkpoint and is not replaced"):
            convert(source, tmp_path / "mine", to="hf", force=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mine"]

    @pytest.mark.parametrize("target", ["a", "."])
    def test_the_source_is_never_the_target(self, source, tmp_path, target):
        before = {path: path.read_bytes() for path in source.iterdir()}
        with pytest.raises(CheckpointError, match="holds the source; expected another folder"):
            convert(source, tmp_path / target, to="hf", force=True)
        assert {path: path.read_bytes() for path in source.iterdir()} == before


class TestDtype:
    def test_dense_weights_are_cast_and_the_config_says_so(self, tmp_path):
        example = EXAMPLES["mistral"]()
        write_example(tmp_path / "a", example, "mistral", {"dtype": "bfloat16"})
        convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="float32", verify=True)
        expected = {name: values.astype(np.float32) for name, values in hf_tensors(example).items()}
        assert_same_tensors(tensors_of(tmp_path / "b"), expected)
        assert document(tmp_path / "b", "hf")["dtype"] == "float32"
        convert(tmp_path / "b", tmp_path / "c", to="mistral")
        assert document(tmp_path / "c", "mistral")["dtype"] == "float32"

    def test_quantised_weights_and_scales_are_not(self, tmp_path):
        example = EXAMPLES["vision_fp8"]()
        write_example(tmp_path / "a", example, "mistral")
        convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="float16")
        for name, values in tensors_of(tmp_path / "b").items():
            original = hf_tensors(example)[name]
            if original.dtype == ml_dtypes.bfloat16 and name.endswith(".weight"):
                assert values.dtype == np.float16
            else:
                assert values.dtype == original.dtype

    def test_a_value_that_does_not_fit_is_refused_and_not_made_infinite(self, tmp_path):
        example = EXAMPLES["mistral"]()
        example.tensors["norm.weight"][3] = 1e6
        write_example(tmp_path / "a", example, "mistral")
        with pytest.raises(CheckpointError, match=r"'norm\.weight' has values beyond float16"):
            convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="float16")
        assert not (tmp_path / "b").exists()
        convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="float32")


class TestOrbax:
    @pytest.mark.parametrize(("name", "layout"), [("ministral", "mistral"), ("vision_fp8", "hf"), ("nvfp4", "mistral")])
    def test_to_orbax_and_back_keeps_every_byte(self, tmp_path, name, layout):
        written = write_example(tmp_path / "a", EXAMPLES[name](), layout, UNKNOWN)
        convert(tmp_path / "a", tmp_path / "b", to="orbax", verify=True)
        convert(tmp_path / "b", tmp_path / "c", to=layout)
        assert_same_tensors(tensors_of(tmp_path / "c"), written)
        assert document(tmp_path / "c", layout) == document(tmp_path / "a", layout)

    def test_orbax_itself_restores_the_parameters_as_memory_has_them(self, tmp_path):
        import orbax.checkpoint as ocp

        example = EXAMPLES["mistral"]()
        write_example(tmp_path / "a", example, "mistral")
        convert(tmp_path / "a", tmp_path / "b", to="orbax")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(tmp_path / "b" / "orbax")
        found = np.asarray(tree["layers"]["1"]["attention"]["wq"]["weight"])
        np.testing.assert_array_equal(found, example.tensors["layers.1.attention.wq.weight"])

    def test_a_damaged_folder_is_one_line(self, tmp_path):
        write_example(tmp_path / "a", EXAMPLES["mistral"](), "mistral")
        convert(tmp_path / "a", tmp_path / "b", to="orbax")
        (tmp_path / "b" / "orbax" / "_METADATA").write_text("{")
        with pytest.raises(CheckpointError, match="orbax: cannot be read by orbax") as caught:
            convert(tmp_path / "b", tmp_path / "c", to="mistral")
        assert "\n" not in str(caught.value)


def test_verification_finds_a_flipped_bit(tmp_path, monkeypatch):
    from ministral_jax.checkpoints.conversion import convert as module

    write_example(tmp_path / "a", EXAMPLES["mistral"](), "mistral")
    real = module._target_pieces

    def flipped(plan: Any, pieces: Any, name: str) -> Any:
        for piece in real(plan, pieces, name):
            if name == "model.norm.weight":
                piece.view(np.uint8)[5] ^= 1
            yield piece

    monkeypatch.setattr(module, "_target_pieces", flipped)
    with pytest.raises(CheckpointError, match=r"differs from its source: norm\.weight: 1 of 64 elements differ"):
        convert(tmp_path / "a", tmp_path / "b", to="hf", verify=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["ministral", "vision_fp8", "small_4"])
def test_layouts_of_one_model_compare_as_the_same(tmp_path, name):
    for layout in ("mistral", "hf"):
        write_example(tmp_path / layout, EXAMPLES[name](), layout)
    with open_checkpoint(tmp_path / "mistral") as a, open_checkpoint(tmp_path / "hf") as b:
        comparison = compare(a, b)
    assert comparison.same
    assert comparison.tensors == len(EXAMPLES[name]().tensors)
