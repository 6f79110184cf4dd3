"""Quantising experts and latent attention: which modules, in which words, and that it means and computes the same."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.calibration import input_maxima
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.checkpoints.load import load_model
from ministral_jax.errors import CheckpointError
from ministral_jax.linear import projections
from ministral_jax.moe import MoE
from ministral_jax.parameters import fill, parameters
from ministral_jax.quantization import LinearFormat
from ministral_jax.transformer import Transformer
from tests.architecture_files import LARGE_3, LATENT, MIXTRAL, SMALL_4, make, read_file, write_example
from tests.ministral_jax.paged_runner import QUICK
from tests.quantized_files import E4M3, encode, nearest_e2m1, pack, spread, values

# Widths that four bits can have.
_WIDE = dataclasses.replace(LATENT, q_rank=48, kv_rank=32)
CONFIGS = {
    "mixtral": MIXTRAL,
    "small_4": dataclasses.replace(SMALL_4, latent=_WIDE),
    "large_3": dataclasses.replace(LARGE_3, latent=_WIDE),
}
STORED = [
    LinearFormat("int8_channel", "dynamic"),
    LinearFormat("fp8_tensor", "dynamic"),
    LinearFormat("fp8_channel", "dynamic"),
    LinearFormat("fp8_block", "dynamic"),
    LinearFormat("nvfp4"),
    LinearFormat("nf4", double=True),
]
TOKENS = jnp.asarray([[1, 5, 9, 2, 77, 31, 8, 64]])
FIRST_LATENT = {"attention.wq_a", "attention.wkv_a_with_mqa"}
FILES = {"mistral": "consolidated.safetensors", "hf": "model.safetensors"}
CASES = [(kind, stored, to) for kind in CONFIGS for stored in STORED for to in FILES if (kind, to) != ("large_3", "hf")]
# Every format, model and layout once in every run of the tests.
QUICK_CASES = {
    ("mixtral", "int8_channel", "mistral"),
    ("mixtral", "fp8_channel", "hf"),
    ("small_4", "fp8_tensor", "mistral"),
    ("small_4", "fp8_block", "hf"),
    ("small_4", "nf4", "mistral"),
    ("large_3", "nvfp4", "mistral"),
}
RUN_CASES = {("mixtral", "int8_channel", "mistral"), ("large_3", "nvfp4", "mistral")}


def by_case(quick):
    """All cases, of which those in `quick` are not slow."""
    return pytest.mark.parametrize(
        ("kind", "stored", "to"),
        [
            pytest.param(
                *(kind, stored, to),
                id=f"{kind}-{stored.format}-{to}",
                marks=() if (kind, stored.format, to) in quick else pytest.mark.slow,
            )
            for kind, stored, to in CASES
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        example = make(config, dtype=np.dtype(np.float32))
        for name, array in example.tensors.items():
            example.tensors[name] = array * np.float32(0.3) if array.ndim > 1 else 1 + array / 10
        write_example(made / kind, example, "mistral")
    return made


def written(folder, kind, stored, to):
    """The quantised checkpoint of a case, made once."""
    target = folder / f"{kind}-{stored.format}-{stored.activations}-{to}"
    if not target.exists():
        quantize(folder / kind, target, stored=stored, to=to)
    return target


def dense_kind(kind, stored):
    """What stays dense of the projections, as published: see docs/quantization.md."""
    if kind == "mixtral" or stored.format == "fp8_tensor":
        return set()
    return (
        FIRST_LATENT | {"attention.wq_b", "attention.wkv_b", "attention.wo"}
        if stored.format == "nvfp4"
        else FIRST_LATENT
    )


def dequantised(model):
    """Dense values of every parameter of a model, experts stacked, by the formulas of the tests."""
    arrays = parameters(model)
    found = {name: array for name, array in arrays.items() if name.endswith(".weight")}
    for name, linear in projections(model).items():
        if linear.stored is None:
            continue
        shapes = linear.stored.parts(*linear.shape)
        parts = {part: np.asarray(arrays[f"{name}.{part}"]) for part in shapes}
        experts = range(CONFIGS["mixtral"].moe.n_experts) if ".experts." in name else [...]
        meant = [values({part: shaped(array[e], part) for part, array in parts.items()}, linear.stored.format)
                 for e in experts]  # fmt: skip
        found[f"{name}.weight"] = np.stack(meant).reshape(-1, *linear.shape)[... if len(meant) > 1 else 0]
        found[f"{name}.weight"] = found[f"{name}.weight"].astype(np.float32)
    return found


def shaped(array, part):
    """Scales as files have them: one per row in a column, a lone divisor in an axis."""
    if part == "weight_global_scale":
        return array.reshape(1)
    return array[:, None] if part == "weight_scale" and array.ndim == 1 else array


def with_one_scale(weights, name):
    """fp8_tensor and nvfp4 of w1 and w3 of an expert with the scale of the larger of the two."""
    largest = max(np.abs(weight).max() for weight in weights)
    meant = []
    for weight in weights:
        if name == "fp8_tensor":
            scale = np.float32(largest / np.float32(448))
            meant.append(np.clip(weight / scale, -448, 448).astype(E4M3).astype(np.float64) * scale)
            continue
        divisor = np.float32(448 * 6) / largest
        scale = ((np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / np.float32(6)) * divisor).astype(E4M3)
        local = spread(scale.astype(np.float32) / divisor, 1, 16, weight.shape)
        parts = {"weight_packed": pack(nearest_e2m1(weight / local)), "weight_scale": scale,
                 "weight_global_scale": divisor.reshape(1)}  # fmt: skip
        meant.append(values(parts, name))
    return meant


def expected(weights, stored):
    """The matrices that w1, w2 and w3 of an expert become, by the formulas of the tests."""
    spelling = "double" if stored.double else "compressed"
    found = {part: values(encode(w, stored.format, "none", spelling), stored.format) for part, w in weights.items()}
    if stored.format in ("fp8_tensor", "nvfp4"):
        found |= dict(zip(("w1", "w3"), with_one_scale([weights["w1"], weights["w3"]], stored.format), strict=True))
    return found


@by_case(QUICK_CASES)
def test_what_is_written_means_what_the_format_makes_of_every_expert(folder, kind, stored, to):
    path = written(folder, kind, stored, to)
    original, model = parameters(load_model(folder / kind)), load_model(path, activations="plain")
    found = dequantised(model)
    assert found.keys() == original.keys()
    dense = {name.split(".", 2)[2] for name, linear in projections(model).items() if linear.stored is None}
    assert dense == dense_kind(kind, stored)
    stem, experts = "layers.1.feed_forward.experts", CONFIGS[kind].moe.n_experts
    for expert in range(experts):
        weights = {part: np.asarray(original[f"{stem}.{part}.weight"][expert]) for part in ("w1", "w2", "w3")}
        for part, meant in expected(weights, stored).items():
            np.testing.assert_array_equal(found[f"{stem}.{part}.weight"][expert], meant.astype(np.float32), part)
    for name, array in original.items():
        linear = projections(model).get(name.removesuffix(".weight"))
        if linear is None or linear.stored is None:  # gates, norms, embeddings, head
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        else:
            error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
            assert 0 < error < 0.12, name


def logits(model):
    return np.asarray(jax.jit(model.__call__, compiler_options=QUICK)(TOKENS))


@by_case(RUN_CASES)
def test_logits_are_those_of_the_dense_weights_that_are_meant(folder, kind, stored, to):
    model = load_model(written(folder, kind, stored, to), activations="plain")
    plain = fill(Transformer(CONFIGS[kind]), {name: jnp.asarray(array) for name, array in dequantised(model).items()})
    wanted = logits(plain)
    assert np.abs(logits(model) - wanted).max() < 1e-5 * np.ptp(wanted)


@by_case(QUICK_CASES)
def test_both_layouts_hold_the_same_and_are_converted_into_each_other(folder, tmp_path, kind, stored, to):
    if kind == "large_3":
        with pytest.raises(CheckpointError, match="Mistral Large 3 has no HF form"):
            quantize(folder / kind, tmp_path / "out", stored=stored, to="hf")
        return
    path = written(folder, kind, stored, to)
    other = "hf" if to == "mistral" else "mistral"
    if stored.format == "nf4" or (stored.format == "fp8_tensor" and to == "hf"):
        other = to  # nf4's block and one scale in compressed-tensors' words have no other spelling, or are the same
    convert(path, tmp_path / "out", to=other, verify=True)
    before, after = (parameters(load_model(folder)) for folder in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert np.asarray(array).tobytes() == np.asarray(after[name]).tobytes(), name


def test_single_experts_are_named_as_compressed_tensors_names_modules(folder):
    tensors = read_file(written(folder, "small_4", STORED[0], "hf") / FILES["hf"])
    assert tensors["model.layers.1.mlp.experts.3.gate_proj.weight"].dtype == np.int8
    assert tensors["model.layers.1.mlp.experts.3.gate_proj.weight_scale"].shape == (32, 1)
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == np.float32
    tensors = read_file(written(folder, "mixtral", STORED[4], "hf") / FILES["hf"])
    assert tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight_packed"].shape == (64, 48)
    tensors = read_file(written(folder, "large_3", STORED[3], "mistral") / FILES["mistral"])
    assert tensors["layers.1.experts.3.w2.weight_scale"].shape == (1, 1)
    assert "layers.0.attention.wq_a.weight_scale" not in tensors
    tensors = read_file(written(folder, "small_4", STORED[1], "mistral") / FILES["mistral"])
    assert tensors["layers.1.experts.3.w1.qscale_weight"] == tensors["layers.1.experts.3.w3.qscale_weight"]
    assert tensors["layers.1.attention.wkv_a_with_mqa.qscale_weight"].shape == ()


@pytest.mark.parametrize(
    ("kind", "number", "to", "ignored"),
    [
        ("mixtral", 0, "hf", ["lm_head", "re:.*gate$"]),
        ("small_4", 4, "hf", ["lm_head", "re:.*gate$", "re:.*self_attn.*", "re:.*attention.*"]),
        ("small_4", 2, "hf", ["lm_head", "re:.*gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$"]),
        ("large_3", 3, "mistral", ["lm_head", "re:.*gate$", "re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$",
                                   "re:.*wq_a$", "re:.*wkv_a_with_mqa$"]),
    ],
)  # fmt: skip
def test_the_config_says_what_is_left_alone(folder, kind, number, to, ignored):
    path = written(folder, kind, STORED[number], to)
    document = json.loads((path / ("config.json" if to == "hf" else "params.json")).read_text())
    assert document["quantization_config"]["ignore"] == ignored
    patterns = [pattern.removeprefix("re:") for pattern in ignored]
    modules = {name.rpartition(".weight")[0] for name in read_file(path / FILES[to])}
    for module in modules - {"", "norm", "model.norm", "tok_embeddings", "output", "model.embed_tokens", "lm_head"}:
        dense = f"{module}.weight_scale" not in read_file(path / FILES[to])
        if not module.endswith(("norm", "layernorm")):
            assert any(re.fullmatch(pattern, module) for pattern in patterns) == dense, module


def test_a_run_that_was_cut_off_goes_on_where_a_file_ended(folder, tmp_path):
    whole = quantize(folder / "mixtral", tmp_path / "whole", stored=STORED[0], max_shard_bytes=60_000)
    assert len(whole.files) > 3
    half = 0

    def stop(done, total):
        nonlocal half
        half += 1
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder / "mixtral", tmp_path / "out", stored=STORED[0], max_shard_bytes=60_000, progress=stop)
    report = quantize(folder / "mixtral", tmp_path / "out", stored=STORED[0], max_shard_bytes=60_000)
    assert report.resumed
    assert report.errors == whole.errors
    for name in whole.files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", ["mixtral", "small_4"])
def test_largest_inputs_of_experts_are_those_of_the_tokens_that_come_to_each(tmp_path, kind, monkeypatch):
    config = dataclasses.replace(CONFIGS[kind], n_layers=1, windows=(None,))
    write_example(tmp_path / "m", make(config, dtype=np.dtype(np.float32)), "mistral")
    model, sequences, inputs = load_model(tmp_path / "m"), [[3, 4, 5], [6, 7]], []
    found = input_maxima(model, sequences)
    with monkeypatch.context() as patch:
        patch.setattr(MoE, "__call__", lambda moe, x: inputs.append(np.asarray(x[0], np.float64)) or x)
        for ids in sequences:
            model.hidden(jnp.asarray([ids]))
    arrays = {name: np.asarray(array, np.float64) for name, array in parameters(model.layers[0].feed_forward).items()}
    x, moe = np.concatenate(inputs), config.moe
    chosen = np.argsort(-(x @ arrays["gate.weight"].T), axis=1)[:, : moe.experts_per_token]
    seen = {}
    for expert in range(moe.n_experts):
        rows = x[(chosen == expert).any(1)]
        if len(rows):
            hidden = silu(rows @ arrays["experts.w1.weight"][expert].T) * (rows @ arrays["experts.w3.weight"][expert].T)
            seen[expert] = np.abs(rows).max(), np.abs(hidden).max()
    most = np.max(list(seen.values()), axis=0)  # for experts that no token came to
    assert len({given for given, _ in seen.values()}) > 1
    for expert in range(moe.n_experts):
        given, inner = seen.get(expert, most)
        stem = f"layers.0.feed_forward.experts.{expert}"
        assert found[f"{stem}.w1"] == found[f"{stem}.w3"] == pytest.approx(given, rel=1e-4)
        assert found[f"{stem}.w2"] == pytest.approx(inner, rel=1e-4)
    assert not any("seen" in name for name in parameters(model))
    if kind == "small_4":
        assert found["layers.0.feed_forward.shared_experts.w1"] == pytest.approx(np.abs(x).max(), rel=1e-4)
        assert "layers.0.attention.wq_a" in found


def test_experts_that_no_token_came_to_have_the_scale_of_the_largest(tmp_path):
    write_example(tmp_path / "m", make(MIXTRAL, dtype=np.dtype(np.float32)), "mistral")
    found = input_maxima(load_model(tmp_path / "m"), [[3]])  # two of four experts in each layer
    of_layer = [found[f"layers.1.feed_forward.experts.{expert}.w2"] for expert in range(4)]
    assert min(of_layer) > 0
    assert sorted(of_layer)[-3:] == [max(of_layer)] * 3


@pytest.mark.parametrize("to", FILES)
def test_static_scales_of_activations_are_those_of_each_expert(folder, tmp_path, to):
    maxima = input_maxima(load_model(folder / "small_4"), [[3, 4, 5, 9, 11]])
    quantize(
        folder / "small_4", tmp_path / "out", stored=LinearFormat("fp8_tensor", "static"), to=to, input_maxima=maxima
    )
    model = load_model(tmp_path / "out")
    scales = projections(model)["layers.1.feed_forward.experts.w2"].input_scale[...]
    wanted = [maxima[f"layers.1.feed_forward.experts.{expert}.w2"] / 448 for expert in range(4)]
    np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    if to == "mistral":
        convert(tmp_path / "out", tmp_path / "hf", to="hf", verify=True)
        assert read_file(tmp_path / "hf" / FILES["hf"])[
            "model.layers.0.mlp.experts.down_proj_activation_scale"
        ].shape == (4,)
