"""Merging adapters: what is written computes what base and adapter compute together, in any layout and format."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ministral_jax.checkpoints.adapters import save_adapter
from ministral_jax.checkpoints.conversion import merged as merged_module
from ministral_jax.checkpoints.conversion import pieces
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.merge import merge
from ministral_jax.checkpoints.load import load_model
from ministral_jax.errors import MinistralError
from ministral_jax.lora import LoraConfig, adapted, attach
from ministral_jax.parameters import fill, parameters
from ministral_jax.transformer import Transformer
from tests.architecture_files import EXAMPLES, MIXTRAL, make, write_example
from tests.checkpoint_files import interleaved, random_weights, tiny_config, write_tiny_checkpoint
from tests.quantized_files import CASES, write_quantized_checkpoint

from .test_convert_process import write_sparse

ROOT = Path(__file__).parents[4]
RANK, SCALE = 4, 1.75
PATTERNS = LoraConfig(targets=("wq", "wk", "w2"), rank=RANK, alpha=7.0, rank_pattern={"wq": 2}, dropout=0.1)
TOKENS = np.arange(20)[None] * 37 % 128


def write_adapter(folder, config, to, lora=None, **options):
    """An adapter with wide A and B; returns module -> the product that it adds, in memory order and float64."""
    model = Transformer(config)
    attach(model, lora or LoraConfig(rank=RANK, scaling=SCALE))
    random = np.random.default_rng(5)
    base = random_weights(config)

    def values(name, spec):
        return jnp.asarray(0.3 * random.standard_normal(spec.shape) if spec.adapter else base[name], jnp.float32)

    model = fill(model, values)
    save_adapter(folder, model, to=to, base="some/base", **options)
    return {
        f"{name}.weight": linear.adapter.scale
        * np.asarray(linear.lora_b[...], np.float64)
        @ np.asarray(linear.lora_a[...], np.float64)
        for name, linear in adapted(model).items()
    }


def logits(model):
    graph, weights = nnx.split(model)
    return np.asarray(jax.jit(lambda weights: nnx.merge(graph, weights)(jnp.asarray(TOKENS)))(weights))


@pytest.mark.parametrize("to", ["mistral", "hf"])
@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("written", ["mistral", "hf"])
@pytest.mark.parametrize(("kind", "lora"), [("mistral_window", None), ("ministral3", PATTERNS)])
def test_a_merged_weight_is_the_weight_and_the_scaled_product(tmp_path, kind, lora, layout, written, to):
    config = tiny_config(kind, n_layers=1)
    weights = write_tiny_checkpoint(tmp_path / "base", config, layout)
    added = write_adapter(tmp_path / "lora", config, written, lora)
    report, merging = merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m", to=to, verify=True)
    assert (report.to, merging.modules, merging.dequantized) == (to, len(added), None)
    found = parameters(load_model(tmp_path / "m"))
    for name, weight in weights.items():
        expected = weight.astype(np.float64) + added.get(name, 0.0)
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6 * np.ptp(expected), err_msg=name)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_merged_equals_unmerged(tmp_path, layout):
    # No class of transformers mixes windows and has a temperature.
    config = tiny_config("ministral3" if layout == "mistral" else "ministral", n_layers=2, windows=(None, 5))
    write_tiny_checkpoint(tmp_path / "base", config, layout)
    write_adapter(tmp_path / "lora", config, "hf")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m")
    apart = logits(load_model(tmp_path / "base", adapter=tmp_path / "lora"))
    assert np.abs(apart - logits(load_model(tmp_path / "base"))).max() > 0.1 * np.ptp(apart)
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")), apart, rtol=0, atol=1e-5 * np.ptp(apart))


WIDE = {"dim": 128, "hidden_dim": 320, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_quantised_base_is_made_dense_first_and_that_is_said(tmp_path, caplog, case):
    layout = "mistral" if case[2] == "mistral" or case[0] in ("int8_channel", "nf4") else "hf"
    config = tiny_config("ministral3", **WIDE)
    meant = write_quantized_checkpoint(tmp_path / "base", config, layout, case)
    added = write_adapter(tmp_path / "lora", config, "mistral", PATTERNS)
    to = "mistral" if layout == "hf" else "hf"
    _, merging = merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m", to=to, dtype="float32", verify=True)
    assert (merging.stored, merging.dequantized) == (case[0], "float32")
    assert f"is stored as {case[0]}; all its projections are written as float32" in caplog.text
    model = load_model(tmp_path / "m")
    assert model.config.quantization is None
    for name, array in parameters(model).items():
        expected = meant[name] + added.get(name, 0.0)
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6 * np.ptp(expected), err_msg=name)
    assert "quantization" not in (tmp_path / "m" / ("params.json" if to == "mistral" else "config.json")).read_text()


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids="-".join)
def test_merged_equals_unmerged_over_a_quantised_base(tmp_path, case):
    config = tiny_config("mistral_window", n_layers=2)
    write_quantized_checkpoint(tmp_path / "base", config, "mistral", case)
    write_adapter(tmp_path / "lora", config, "hf")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m", dtype="float32")
    apart = logits(load_model(tmp_path / "base", adapter=tmp_path / "lora", activations="plain"))
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")), apart, rtol=0, atol=1e-5 * np.ptp(apart))


def test_what_is_stored_in_bfloat16_is_rounded_once(tmp_path):
    config = tiny_config("mistral", n_layers=1)
    weights = write_tiny_checkpoint(tmp_path / "base", config, "hf", dtype="bfloat16")
    added = write_adapter(tmp_path / "lora", config, "hf", LoraConfig(targets=("wv", "w1"), rank=RANK))
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for ours, theirs in (("attention.wv", "self_attn.v_proj"), ("feed_forward.w1", "mlp.gate_proj")):
        name = f"layers.0.{ours}.weight"
        total = (weights[name].astype(np.float64) + added[name]).astype(np.float32)
        rounded = found[f"model.layers.0.{theirs}.weight"]
        assert np.mean(rounded == total.astype(ml_dtypes.bfloat16)) > 0.999
        np.testing.assert_allclose(rounded.astype(np.float32), total, rtol=2**-8, atol=0)
    same = found["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(same, weights["layers.0.feed_forward.w3.weight"])


def test_values_do_not_depend_on_how_they_are_read(tmp_path, monkeypatch):
    """Small pieces, which end within rows, against a run in one piece."""
    config = tiny_config("mistral", n_layers=1, dim=72, hidden_dim=328)
    write_tiny_checkpoint(tmp_path / "base", config, "mistral")
    write_adapter(tmp_path / "lora", config, "mistral")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "a", to="hf")
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 1000)
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "b", to="hf", verify=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert merged_module.BLOCK_ROWS == 128


def test_adapters_of_experts_are_merged_into_their_own_expert(tmp_path):
    example = make(MIXTRAL, dtype=np.dtype(np.float32))
    base = write_example(tmp_path / "base", example, "mistral")
    random = np.random.default_rng(0)
    module = "layers.1.feed_forward.experts.2.w2"
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((RANK, 96), (64, RANK)))
    (tmp_path / "lora").mkdir()
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "lora" / "lora.safetensors")
    document = json.loads((tmp_path / "base" / "params.json").read_text())
    (tmp_path / "lora" / "params.json").write_text(json.dumps({**document, "lora": {"rank": RANK, "scaling": 0.5}}))
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m")
    for name, array in load_file(tmp_path / "m" / "consolidated.safetensors").items():
        expected = base[name] + (0.5 * b @ a if name == f"{module}.weight" else 0)
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_beside_a_vision_tower_only_the_decoder_changes(tmp_path):
    example = EXAMPLES["vision"]()
    base = write_example(tmp_path / "base", example, "hf")
    config = example.config
    name = "model.language_model.layers.1.self_attn.k_proj"
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((RANK, 64), (32, RANK)))
    (tmp_path / "lora").mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [name]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(document))
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m", to="mistral")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "n")
    found = load_file(tmp_path / "n" / "model.safetensors")
    assert found.keys() == base.keys()
    changed = {key for key, array in base.items() if not np.array_equal(found[key], array)}
    assert changed == {f"{name}.weight"}
    total = base[f"{name}.weight"].astype(np.float64) + b.astype(np.float64) @ a
    native = load_file(tmp_path / "m" / "consolidated.safetensors")["layers.1.attention.wk.weight"]
    np.testing.assert_allclose(native.astype(np.float64), interleaved(total, config.head_dim), rtol=2**-7, atol=1e-2)


def test_files_of_the_base_come_along_and_the_manifest_names_the_adapter(tmp_path):
    config = tiny_config("mistral", n_layers=1)
    write_tiny_checkpoint(tmp_path / "base", config, "mistral")
    (tmp_path / "base" / "tekken.json").write_text("{}")
    write_adapter(tmp_path / "lora", config, "mistral")
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "consolidated.safetensors", "conversion.json", "params.json", "tekken.json",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert f"rank={RANK}, scaling={SCALE}" in manifest["source"]["merged"]
    assert "lora" not in json.loads((tmp_path / "m" / "params.json").read_text())
    convert(tmp_path / "m", tmp_path / "hf", to="hf", verify=True)
    again = parameters(load_model(tmp_path / "hf"))
    assert all(np.array_equal(again[name], array) for name, array in parameters(load_model(tmp_path / "m")).items())


class Killed(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_unless_the_adapter_has_changed(tmp_path):
    config = tiny_config("mistral")
    write_tiny_checkpoint(tmp_path / "base", config, "mistral")
    write_adapter(tmp_path / "lora", config, "mistral")
    arguments = tmp_path / "base", tmp_path / "lora", tmp_path / "m"

    def kill(done, total):
        if done > 0.7 * total:
            raise Killed

    with pytest.raises(Killed):
        merge(*arguments, to="hf", max_shard_bytes=60_000, progress=kill)
    assert not (tmp_path / "m").exists()
    report, _ = merge(*arguments, to="hf", max_shard_bytes=60_000)
    assert report.resumed
    merge(*arguments[:2], tmp_path / "n", to="hf", max_shard_bytes=60_000)
    for path in (tmp_path / "n").iterdir():
        assert path.read_bytes() == (tmp_path / "m" / path.name).read_bytes()
    with pytest.raises(MinistralError, match="exists; expected a new name, or --force"):
        merge(*arguments, to="hf")
    with pytest.raises(Killed):
        merge(*arguments[:2], tmp_path / "o", to="hf", max_shard_bytes=60_000, progress=kill)
    write_adapter(tmp_path / "lora", config, "mistral", LoraConfig(rank=2))
    with pytest.raises(MinistralError, match="was begun"):
        merge(*arguments[:2], tmp_path / "o", to="hf", max_shard_bytes=60_000)
    assert not merge(*arguments[:2], tmp_path / "o", to="hf", max_shard_bytes=60_000, force=True)[0].resumed


def test_what_cannot_be_merged_is_one_line(tmp_path):
    config = tiny_config("mistral", n_layers=1)
    write_tiny_checkpoint(tmp_path / "base", config, "mistral")
    write_tiny_checkpoint(tmp_path / "other", tiny_config("wide_heads", n_layers=1), "mistral")
    write_adapter(tmp_path / "lora", config, "mistral")
    for base, adapter, expected in (
        ("lora", "lora", "is an adapter; expected the model"),
        ("base", "base", "no adapter; expected"),
        ("base", "nothing", "no adapter; expected"),
        ("nothing/x/y", "lora", "no such folder"),
        ("other", "lora", r"tensor 'layers\.0\.attention\.w\w\.lora_[AB]\.weight' has shape"),
    ):
        with pytest.raises(MinistralError, match=expected) as caught:
            merge(tmp_path / base, tmp_path / adapter, tmp_path / "m")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()
    write_adapter(tmp_path / "huge", config, "hf", LoraConfig(scaling=1e12))
    with pytest.raises(
        MinistralError, match=r"wq with its adapter has values beyond float16; expected another --dtype"
    ):
        merge(tmp_path / "base", tmp_path / "huge", tmp_path / "m", dtype="float16")


@pytest.mark.long
def test_a_dense_base_is_merged_in_bounded_memory_and_without_jax(tmp_path):
    """100 MB as for conversion, 32 of blocks and matrices, and what the threads of BLAS take."""
    most = 160 * 10**6
    write_sparse(tmp_path / "base", vocab_size=16384, n_layers=9)
    assert (tmp_path / "base" / "consolidated.safetensors").stat().st_size > 2.5 * most
    a, b = np.ones((16, 1024), np.float32), np.ones((4096, 16), np.float32)
    (tmp_path / "lora").mkdir()
    names = [f"layers.{i}.feed_forward.w{j}" for i in range(9) for j in (1, 3)]
    matrices = {f"{name}.lora_{part}.weight": array for name in names for part, array in (("A", a), ("B", b))}
    save_file(matrices, tmp_path / "lora" / "lora.safetensors", {"scaling": "2.0"})
    (tmp_path / "lora" / "params.json").write_text((tmp_path / "base" / "params.json").read_text())
    program = (
        "import json, sys; from benchmarks.convert import measured;"
        "from ministral_jax.checkpoints.conversion.merge import merge;"
        "found = measured(lambda: merge(*sys.argv[1:4], to='hf', dtype='bfloat16'));"
        "assert 'jax' not in sys.modules; print(json.dumps(found))"
    )
    folders = [str(tmp_path / name) for name in ("base", "lora", "m")]
    ran = subprocess.run(
        [sys.executable, "-c", program, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["peak_bytes"] < most
