"""Quantising checkpoints: what is written, in which words, and that it is read back as what was meant."""

import itertools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax import calibration
from ministral_jax.calibration import input_maxima
from ministral_jax.checkpoints.conversion import quantize as module
from ministral_jax.checkpoints.conversion import staging
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.safetensors import SafetensorsFile
from ministral_jax.errors import CheckpointError, RequestError
from ministral_jax.linear import projections
from ministral_jax.parameters import parameters
from ministral_jax.quantization import LinearFormat
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.quantized_files import encode, is_projection, values

STORED = [
    LinearFormat("int8_channel", "dynamic"),
    LinearFormat("fp8_tensor", "dynamic"),
    LinearFormat("fp8_channel", "dynamic"),
    LinearFormat("fp8_block", "dynamic"),
    LinearFormat("nvfp4"),
    LinearFormat("nf4"),
    LinearFormat("nf4", double=True),
]
PARTS = [*(f"attention.{part}" for part in ("wq", "wk", "wv", "wo")), *(f"feed_forward.w{i}" for i in (1, 2, 3))]


def tensors_of(path):
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize(("stored", "to"), [*zip(STORED, itertools.cycle(["mistral", "hf"])), (STORED[0], "hf")])
def test_what_is_written_is_read_as_what_the_format_makes_of_the_weights(tmp_path, stored, to):
    weights = write_tiny_checkpoint(tmp_path / "dense", tiny_config(n_layers=1), "mistral", dtype="bfloat16")
    report = quantize(tmp_path / "dense", tmp_path / "out", stored=stored, to=to)
    model = load_model(tmp_path / "out", dtype="float32")
    layers = projections(model)
    assert sorted(report.errors) == sorted(layers)
    for name, layer in layers.items():
        assert layer.stored == stored
        found = np.asarray(layer.quantized_weight().dequantize(), np.float64)
        dense = weights[f"{name}.weight"].astype(np.float64)
        error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
        assert error == pytest.approx(report.errors[name], rel=1e-3)
        assert error < 0.12
        if not stored.double and stored.format != "fp8_block":  # blocks are those of the file's rows, which are moved
            expected = values(encode(dense.astype(np.float32), stored.format), stored.format)
            np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32), err_msg=name)
    for name, array in parameters(model).items():
        if name in weights and not is_projection(name):
            np.testing.assert_array_equal(array, weights[name].astype(np.float32))


def test_fp8_in_the_mistral_layout_is_spelled_as_published(tmp_path):
    config = tiny_config("ministral3_tied", n_layers=1)
    write_tiny_checkpoint(tmp_path / "dense", config, "mistral", dtype="bfloat16")
    maxima = input_maxima(load_model(tmp_path / "dense"), [[1, 5, 9], [2, 7]])
    stored = LinearFormat("fp8_tensor", "static")
    quantize(tmp_path / "dense", tmp_path / "out", stored=stored, input_maxima=maxima)
    tensors = tensors_of(tmp_path / "out" / "consolidated.safetensors")
    assert {name for name in tensors if name.startswith("layers.0.attention.wq")} == {
        f"layers.0.attention.wq.{leaf}" for leaf in ("weight", "qscale_weight", "qscale_act")
    }
    assert tensors["layers.0.attention.wq.qscale_act"].shape == ()
    found = tensors["layers.0.attention.wq.qscale_act"]
    assert found == pytest.approx(maxima["layers.0.attention.wq"] / 448)
    document = json.loads((tmp_path / "out" / "params.json").read_text())
    assert document["quantization"] == {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}


def test_compressed_tensors_go_into_hf(tmp_path):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(n_layers=1), "mistral", dtype="bfloat16")
    quantize(tmp_path / "dense", tmp_path / "out", stored=STORED[0], to="hf")
    tensors = tensors_of(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 1)
    assert tensors["model.embed_tokens.weight"].dtype.name == "bfloat16"
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["dtype"] == "bfloat16"
    block = document["quantization_config"]
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "int-quantized")
    assert block["ignore"] == ["lm_head"]


@pytest.mark.parametrize("stored", [STORED[0], STORED[1], STORED[4], STORED[6]], ids=lambda stored: stored.format)
def test_quantised_checkpoints_are_converted_as_they_are(tmp_path, stored):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(n_layers=1), "mistral", dtype="bfloat16")
    quantize(tmp_path / "dense", tmp_path / "out", stored=stored)
    convert(tmp_path / "out", tmp_path / "hf", to="hf")
    before, after = (parameters(load_model(tmp_path / name)) for name in ("out", "hf"))
    assert sorted(before) == sorted(after)
    for name, array in before.items():
        assert np.asarray(array).tobytes() == np.asarray(after[name]).tobytes(), name


def test_largest_inputs_are_those_of_the_tokens_given(tmp_path):
    weights = write_tiny_checkpoint(tmp_path, tiny_config(n_layers=1))
    model = load_model(tmp_path)
    found = input_maxima(model, [[3, 4, 5]])
    x = weights["tok_embeddings.weight"][[3, 4, 5]].astype(np.float64)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["layers.0.attention_norm.weight"]
    assert found["layers.0.attention.wq"] == pytest.approx(np.abs(normed).max(), rel=1e-5)
    assert found["layers.0.attention.wk"] == found["layers.0.attention.wq"]
    assert input_maxima(model, [[3, 4, 5], [6] * 70])["layers.0.feed_forward.w2"] >= found["layers.0.feed_forward.w2"]
    assert not any("seen" in name for name in parameters(model))
    with pytest.raises(RequestError, match="token id 128"):
        input_maxima(model, [[128]])
    with pytest.raises(RequestError, match="no tokens"):
        input_maxima(model, [])


def test_padding_does_not_count_as_input(tmp_path, monkeypatch):
    write_tiny_checkpoint(tmp_path, tiny_config(n_layers=2))
    model = load_model(tmp_path)
    padded = input_maxima(model, [[3, 4, 5, 6]])
    monkeypatch.setattr(calibration, "SHORTEST", 4)
    assert input_maxima(model, [[3, 4, 5, 6]]) == pytest.approx(padded, rel=1e-5)


def test_activations_within_their_static_scale_change_little(tmp_path):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(n_layers=1))
    model = load_model(tmp_path / "dense")
    tokens = [1, 5, 9, 2, 77, 31, 8, 64]
    maxima = input_maxima(model, [tokens])
    quantize(tmp_path / "dense", tmp_path / "out", stored=LinearFormat("fp8_tensor", "static"), input_maxima=maxima)
    expected = np.asarray(jax.jit(model.__call__)(jnp.asarray([tokens])))
    for activations, allowed in (("plain", 0.1), ("quantized", 0.15)):
        quantized = load_model(tmp_path / "out", activations=activations)
        found = np.asarray(jax.jit(quantized.__call__)(jnp.asarray([tokens])))
        assert 1e-4 < np.abs(found - expected).mean() / np.ptp(expected) < allowed


def test_shards_have_an_index(tmp_path):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(), "hf")
    report = quantize(tmp_path / "dense", tmp_path / "out", stored=STORED[4], max_shard_bytes=40_000)
    assert len(report.files) > 2
    assert report.n_bytes < report.n_bytes_before
    assert len(projections(load_model(tmp_path / "out"))) == 21


def test_a_failure_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config())
    with monkeypatch.context() as patched:
        patched.setattr(
            "ministral_jax.checkpoints.conversion.quantize.encode",
            lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")),
        )
        with pytest.raises(CheckpointError, match="full"):
            quantize(tmp_path / "dense", tmp_path / "out", stored=STORED[0])
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "dense", tmp_path / "out", stored=STORED[0])
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


def interrupted(source, target, monkeypatch, **options):
    """A run that ends after its second file."""
    with monkeypatch.context() as patch:
        calls = iter([module.write_streamed, module.write_streamed])

        def write(*arguments):
            try:
                return next(calls)(*arguments)
            except StopIteration:
                raise KeyboardInterrupt from None

        patch.setattr(module, "write_streamed", write)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, target, max_shard_bytes=40_000, **options)
    assert not target.exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_cut_off_is_finished_by_the_next_to_the_same_bytes(tmp_path, monkeypatch):
    source = tmp_path / "dense"
    write_tiny_checkpoint(source, tiny_config())
    maxima = {f"layers.{i}.{part}": 1.0 + i for i in range(3) for part in PARTS}
    options = {"stored": LinearFormat("fp8_tensor", "static"), "to": "hf", "input_maxima": maxima}
    expected = quantize(source, tmp_path / "whole", max_shard_bytes=40_000, **options)
    interrupted(source, tmp_path / "out", monkeypatch, **options)
    report = quantize(source, tmp_path / "out", max_shard_bytes=40_000, **options)
    assert [name[:11] for name in report.resumed] == ["model-00001", "model-00002"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert list(report.errors.items()) == list(expected.errors.items())
    assert sorted(os.listdir(tmp_path)) == ["dense", "out", "whole"]


def test_other_inputs_or_another_source_are_not_mixed_with_what_was_begun(tmp_path, monkeypatch):
    source = tmp_path / "dense"
    write_tiny_checkpoint(source, tiny_config())
    maxima = {f"layers.{i}.{part}": 1.0 for i in range(3) for part in PARTS}
    options = {"stored": LinearFormat("fp8_tensor", "static"), "max_shard_bytes": 40_000}
    interrupted(source, tmp_path / "out", monkeypatch, stored=options["stored"], input_maxima=maxima)
    with pytest.raises(CheckpointError, match=r"was begun with other options.*give --force"):
        quantize(source, tmp_path / "out", input_maxima={**maxima, "layers.2.attention.wq": 2.0}, **options)
    (source / "params.json").write_bytes((source / "params.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"params\.json of the source has changed since"):
        quantize(source, tmp_path / "out", input_maxima=maxima, **options)
    assert quantize(source, tmp_path / "out", input_maxima=maxima, force=True, **options).resumed == ()


def test_a_run_that_was_cut_off_when_it_had_its_name_is_told_as_whole(tmp_path, monkeypatch):
    source = tmp_path / "dense"
    write_tiny_checkpoint(source, tiny_config())
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_remove", lambda partial: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", stored=STORED[0])
    assert sorted(os.listdir(tmp_path)) == ["dense", "out", "out.partial"]
    report = quantize(source, tmp_path / "out", stored=STORED[0])
    assert len(report.errors) == 21
    assert sorted(os.listdir(tmp_path)) == ["dense", "out"]


def test_a_source_that_changes_under_a_run_is_told(tmp_path, monkeypatch):
    source = tmp_path / "dense"
    write_tiny_checkpoint(source, tiny_config())
    real = module.write_streamed

    def changing(*arguments):
        os.utime(source / "consolidated.safetensors")
        return real(*arguments)

    monkeypatch.setattr(module, "write_streamed", changing)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        quantize(source, tmp_path / "out", stored=STORED[0])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantised_is_one_line(tmp_path):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(hidden_dim=72))
    with pytest.raises(CheckpointError, match="nvfp4 is made of dense matrices with a multiple of 16 columns"):
        quantize(tmp_path / "dense", tmp_path / "out", stored=LinearFormat("nvfp4"))
    quantize(tmp_path / "dense", tmp_path / "int8", stored=STORED[0])
    with pytest.raises(CheckpointError, match=r"is quantised already \(int8_channel\)"):
        quantize(tmp_path / "int8", tmp_path / "out", stored=STORED[0])
    with pytest.raises(CheckpointError, match="exists"):
        quantize(tmp_path / "dense", tmp_path / "int8", stored=STORED[0])
