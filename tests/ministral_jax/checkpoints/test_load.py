"""A folder of weights becomes a model: values, dtypes, shards, memory, and files that change afterwards."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ministral_jax
from ministral_jax.checkpoints import load as load_module
from ministral_jax.checkpoints.layouts import hf_name
from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.safetensors import ALIGNMENT, SafetensorsFile
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.checkpoints.weight_files import WeightFiles
from ministral_jax.config import ModelConfig
from ministral_jax.config_files import write_config_json, write_params_json
from ministral_jax.errors import ConfigError
from ministral_jax.parameters import parameter_specs, parameters
from ministral_jax.row_order import interleaved_rows
from ministral_jax.sharding.rules import Rules
from ministral_jax.transformer import Transformer
from tests.checkpoint_files import KINDS, layout_tensors, tiny_config, write_tiny_checkpoint

ROOT = Path(__file__).parents[3]


def values(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in parameters(model).items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True, err_msg=name)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_loads_exactly_from_both_layouts(tmp_path, kind, layout):
    config = tiny_config(kind)
    weights = write_tiny_checkpoint(tmp_path, config, layout)
    model = load_model(tmp_path)
    assert model.config == config
    assert_equal(values(model), weights)


@pytest.mark.parametrize("wrong", [lambda rows, heads: rows, interleaved_rows], ids=["none", "the inverse"])
def test_a_wrong_permutation_of_mistral_rows_would_be_seen(tmp_path, monkeypatch, wrong):
    weights = write_tiny_checkpoint(tmp_path, tiny_config())
    monkeypatch.setattr(load_module, "half_split_rows", wrong)
    found = values(load_model(tmp_path))
    wrong_names = {name for name in weights if not np.array_equal(found[name], weights[name])}
    assert wrong_names == {f"layers.{i}.attention.{part}.weight" for i in range(3) for part in ("wq", "wk")}


def test_rows_are_permuted_within_heads_also_when_read_in_small_pieces(tmp_path, monkeypatch):
    weights = write_tiny_checkpoint(tmp_path, tiny_config("wide_heads"))
    monkeypatch.setattr(load_module, "CHUNK_BYTES", 5000)
    assert_equal(values(load_model(tmp_path)), weights)


def test_cast_and_permuted_values_are_aligned_for_jax_to_take_over(tmp_path):
    write_tiny_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    with WeightFiles(tmp_path, "mistral") as files:
        for name, heads in (("norm.weight", None), ("layers.0.attention.wq.weight", 4)):
            whole = tuple(slice(None) for _ in files.tensors[name].shape)
            source = load_module.Source(name, heads)
            found = [load_module.read_values(files, source, np.dtype(np.float32), whole) for _ in range(8)]
            assert all(array.ctypes.data % ALIGNMENT == 0 for array in found)


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_values_are_rounded_once_to_the_dtype_asked_for(tmp_path, stored, asked):
    weights = write_tiny_checkpoint(tmp_path, tiny_config(), dtype=stored)
    expected = {name: array.astype(asked) for name, array in weights.items()}
    assert_equal(values(load_model(tmp_path, dtype=asked)), expected)


def test_auto_is_float32_on_cpu_and_says_so_once(tmp_path, caplog):
    write_tiny_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    for dtype in (None, "auto"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "ministral_jax"):
            model = load_model(tmp_path, dtype=dtype)
        assert model.norm.weight[...].dtype == jnp.float32
        assert [r.getMessage().endswith("stored as bfloat16, loaded as float32") for r in caplog.records] == [True]


def test_auto_is_the_stored_dtype_on_an_accelerator(tmp_path, monkeypatch):
    weights = write_tiny_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    monkeypatch.setattr(load_module.jax, "default_backend", lambda: "tpu")
    assert_equal(values(load_model(tmp_path)), weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype(ml_dtypes.bfloat16), "bfloat16"])
def test_dtypes_are_taken_in_every_spelling(tmp_path, dtype):
    write_tiny_checkpoint(tmp_path, tiny_config())
    assert load_model(tmp_path, dtype=dtype).norm.weight[...].dtype == jnp.bfloat16


def test_an_unknown_dtype_is_a_one_line_error(tmp_path):
    write_tiny_checkpoint(tmp_path, tiny_config())
    with pytest.raises(ConfigError, match="dtype='int8' is not allowed: expected auto, bfloat16, float16, float32"):
        load_model(tmp_path, dtype="int8")


def test_windows_replace_those_of_the_file(tmp_path):
    write_tiny_checkpoint(tmp_path, tiny_config("mistral_window", n_layers=4))
    assert load_model(tmp_path, windows="interleaved").config.windows == (None, 5, 5, 5)
    assert load_model(tmp_path, windows=[None, 7]).config.windows == (None, 7, None, 7)


def test_the_front_door_loads_a_folder(tmp_path):
    weights = write_tiny_checkpoint(tmp_path, tiny_config())
    assert_equal(values(ministral_jax.load(tmp_path)), weights)


def test_dense_weights_under_a_quantised_config_are_read_with_a_warning(tmp_path, caplog):
    weights = write_tiny_checkpoint(tmp_path, tiny_config())
    text = (tmp_path / "params.json").read_text().rstrip().rstrip("}")
    (tmp_path / "params.json").write_text(text + ', "quantization": {"qformat_weight": "fp8_e4m3"}}')
    assert_equal(values(load_model(tmp_path)), weights)
    assert "says fp8_tensor, but no projection is stored so" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_happens_to_the_file_later_changes_nothing(tmp_path, dtype):
    weights = write_tiny_checkpoint(tmp_path, tiny_config())
    expected = {name: array.astype(dtype) for name, array in weights.items()}
    model = load_model(tmp_path, dtype=dtype)
    path = tmp_path / "consolidated.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    os.truncate(path, 100)
    assert_equal(values(model), expected)
    path.unlink()
    assert_equal(values(model), expected)


class TestWhichFilesAreRead:
    def test_with_both_layouts_side_by_side_only_mistral_files_are_opened(self, tmp_path):
        config = tiny_config()
        weights = write_tiny_checkpoint(tmp_path, config, "mistral", seed=1)
        write_tiny_checkpoint(tmp_path, config, "hf", seed=2)
        (tmp_path / "model.safetensors").write_bytes(b"never opened")
        assert_equal(values(load_model(tmp_path)), weights)

    def test_with_both_configs_and_hf_weights_only_these_are_read(self, tmp_path):
        config = tiny_config()
        write_tiny_checkpoint(tmp_path, config, "mistral", seed=1)
        weights = write_tiny_checkpoint(tmp_path, config, "hf", seed=2)
        (tmp_path / "consolidated.safetensors").unlink()
        assert_equal(values(load_model(tmp_path)), weights)

    @pytest.mark.parametrize("layout", ["mistral", "hf"])
    @pytest.mark.parametrize("indexed", [True, False])
    def test_shards_are_read_with_their_index_and_without(self, tmp_path, layout, indexed):
        config = tiny_config()
        weights = write_tiny_checkpoint(tmp_path / "whole", config, layout)
        {"mistral": save_mistral, "hf": save_hf}[layout](tmp_path / "parts", weights, config, max_shard_bytes=60_000)
        assert len(list((tmp_path / "parts").glob("*-of-*.safetensors"))) > 2
        if not indexed:
            next((tmp_path / "parts").glob("*.index.json")).unlink()
        assert_equal(values(load_model(tmp_path / "parts")), weights)

    def test_links_of_a_hub_cache_are_followed(self, tmp_path):
        config = tiny_config()
        blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "abc"
        weights = write_tiny_checkpoint(tmp_path / "whole", config, "hf")
        save_hf(tmp_path / "parts", weights, config, max_shard_bytes=60_000)
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, path in enumerate((tmp_path / "parts").iterdir()):
            path.rename(blobs / f"{i:064x}")
            (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
        assert_equal(values(load_model(snapshot)), weights)


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    def test_both_layouts_come_out_as_published(self, tmp_path, kind):
        config = tiny_config(kind)
        weights = write_tiny_checkpoint(tmp_path / "source", config)
        arrays = parameters(load_model(tmp_path / "source"))
        save_mistral(tmp_path / "mistral", arrays, config)
        save_hf(tmp_path / "hf", arrays, config)
        found = load_file(tmp_path / "mistral" / "consolidated.safetensors")
        assert_equal(found, layout_tensors(weights, config, "mistral"))
        assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), layout_tensors(weights, config, "hf"))
        assert load_model(tmp_path / "mistral").config == load_model(tmp_path / "hf").config == config

    @pytest.mark.parametrize("layout", ["mistral", "hf"])
    def test_saving_over_a_checkpoint_leaves_none_of_its_files(self, tmp_path, layout):
        save = {"mistral": save_mistral, "hf": save_hf}[layout]
        old = write_tiny_checkpoint(tmp_path / "old", tiny_config(), layout, seed=1)
        new = write_tiny_checkpoint(tmp_path / "new", tiny_config(), layout, seed=2)
        for first, second in [(60_000, 10**9), (10**9, 60_000), (60_000, 90_000)]:
            save(tmp_path / "x", old, tiny_config(), max_shard_bytes=first)
            save(tmp_path / "x", new, tiny_config(), max_shard_bytes=second)
            assert_equal(values(load_model(tmp_path / "x")), new)

    def test_another_dtype_is_rounded_to(self, tmp_path):
        weights = write_tiny_checkpoint(tmp_path / "source", tiny_config())
        save_mistral(tmp_path / "x", weights, tiny_config(), dtype="bfloat16")
        assert {array.dtype for array in load_file(tmp_path / "x" / "consolidated.safetensors").values()} == {
            np.dtype(ml_dtypes.bfloat16)
        }


class TestPlacement:
    """Each device reads its shard; the values are those of an unsharded load."""

    @pytest.mark.parametrize("layout", ["mistral", "hf"])
    @pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=4", "fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
    def test_shards_hold_the_right_values(self, tmp_path, layout, mesh):
        weights = write_tiny_checkpoint(tmp_path, tiny_config(), layout)
        model = load_model(tmp_path, mesh=mesh)
        assert_equal(values(model), weights)
        sizes = set()
        for name, array in parameters(model).items():
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), weights[name][shard.index])
                sizes.add(array.size // shard.data.size)
        assert max(sizes) == {"tensor=2": 2, "fsdp=4": 4, "fsdp=4,tensor=2": 8}.get(mesh, 4)

    def test_rows_that_cut_through_a_head_are_still_right(self, tmp_path):
        weights = write_tiny_checkpoint(tmp_path, tiny_config())
        rows_of_all = Rules.of("rows", {"heads": (), "kv_heads": ("fsdp",), "embed": ()})
        model = load_model(tmp_path, mesh="fsdp=8", rules=rows_of_all)
        assert_equal(values(model), weights)
        wk = parameters(model)["layers.0.attention.wk.weight"]
        assert wk.addressable_shards[0].data.shape[0] < tiny_config().head_dim

    @pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=4,tensor=2", "data=2,fsdp=4"])
    def test_one_host_reads_every_byte_once(self, tmp_path, monkeypatch, mesh):
        write_tiny_checkpoint(tmp_path, tiny_config())
        read = []
        original = SafetensorsFile._read_bytes

        def counting(self, name, begin, out):
            read.append((name, begin, out.nbytes))
            original(self, name, begin, out)

        monkeypatch.setattr(SafetensorsFile, "_read_bytes", counting)
        load_model(tmp_path, mesh=mesh, dtype="float32")
        with WeightFiles(tmp_path, "mistral") as files:
            assert sum(size for _, _, size in read) == sum(info.n_bytes for info in files.tensors.values())
        assert len({(name, begin) for name, begin, _ in read}) == len(read)

    def test_a_shard_of_whole_heads_reads_no_other_bytes(self, tmp_path):
        write_tiny_checkpoint(tmp_path, tiny_config())
        read = []
        with WeightFiles(tmp_path, "mistral") as files:
            original = files.read_slice

            def counting(name, index):
                rows = original(name, index)
                read.append(rows.nbytes)
                return rows

            files.read_slice = counting
            source = load_module.Source("layers.0.attention.wq.weight", 4)
            found = load_module.read_values(files, source, np.dtype(np.float32), (slice(16, 32), slice(8, 24)))
        assert found.shape == (16, 16)
        assert sum(read) == 16 * 16 * 4


MEASURED = """
import sys, threading, time
import jax, numpy
from ministral_jax.checkpoints.load import load_model
from ministral_jax.parameters import parameters

def used():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssShmem"))]
    return sum(int(line[1]) for line in lines) * 1024

jax.device_put(numpy.zeros(3))
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, used())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(sys.argv[1], dtype=sys.argv[2])
done.set()
watcher.join()
sizes = [array.nbytes for array in parameters(model).values()]
print(max(peak, used()), sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounting of memory")
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("mistral", "bfloat16"),
        pytest.param("hf", "bfloat16", marks=pytest.mark.slow),
        pytest.param("mistral", "float32", marks=pytest.mark.slow),
    ],
)
def test_loading_a_gigabyte_takes_the_model_and_little_more(tmp_path, layout, dtype):
    """A sparse file: its header is true, its values are zeros that take no disk."""
    config = tiny_config(
        dim=2048, n_layers=8, n_heads=16, n_kv_heads=4, head_dim=128, hidden_dim=6144, vocab_size=32768
    )
    n_bytes = write_sparse_checkpoint(tmp_path, config, layout)
    assert n_bytes > 0.95 * 2**30
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak, model, largest = map(int, result.stdout.split())
    assert model == n_bytes * (2 if dtype == "float32" else 1)
    assert peak <= model + largest + 300 * 2**20


def write_sparse_checkpoint(directory: Path, config: ModelConfig, layout: str) -> int:
    """A bfloat16 checkpoint of zeros that occupies only its header on disk; returns the bytes of its tensors."""
    entries, position = {}, 0
    for name, spec in parameter_specs(Transformer(config)).items():
        in_file = name if layout == "mistral" else "lm_head.weight" if name == "output.weight" else hf_name(name)
        end = position + 2 * int(np.prod(spec.shape))
        entries[in_file] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    with open(directory / ("consolidated.safetensors" if layout == "mistral" else "model.safetensors"), "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
    if layout == "mistral":
        write_params_json(config, directory / "params.json")
    else:
        write_config_json(config, directory / "config.json")
    return position


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(tmp_path, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_config(kind)
    weights = write_tiny_checkpoint(tmp_path / "source", config)
    save_hf(tmp_path / "ours", parameters(load_model(tmp_path / "source")), config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert_equal(values(load_model(tmp_path / "theirs")), weights)


def test_the_reader_agrees_with_a_file_of_mixed_dtypes(tmp_path):
    """Norms in float32 beside bfloat16 matrices, as some exports have them."""
    weights = write_tiny_checkpoint(tmp_path, tiny_config(), dtype="bfloat16")
    path = tmp_path / "consolidated.safetensors"
    tensors = load_file(path)
    tensors |= {name: array.astype(np.float32) for name, array in tensors.items() if "norm" in name}
    save_file(tensors, path)
    expected = {name: array.astype(np.float32) for name, array in weights.items()}
    assert_equal(values(load_model(tmp_path)), expected)
