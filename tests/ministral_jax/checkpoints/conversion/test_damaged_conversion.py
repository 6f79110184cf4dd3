"""Damaged and hostile files before the converter: one line that names the file, and nothing is written."""

import json
import os
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.save import save_hf
from ministral_jax.errors import CheckpointError, MinistralError
from tests.architecture_files import EXAMPLES, write_example
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.ministral_jax.checkpoints.test_damaged import changed_headers, joined, split, texts
from tests.mutation import damaged_bytes, damaged_documents

CONFIG = tiny_config(n_layers=1, dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32)
FILE = "consolidated.safetensors"
SEEDS = [0, random.SystemRandom().randrange(2**32)]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_tiny_checkpoint(tmp_path / "a", CONFIG)
    return tmp_path / "a"


def refusal(folder: Path, what: object = "", to: Any = "hf", **options: Any) -> str:
    """The error of converting `folder`: one line about a file of it, and no trace on disk."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(MinistralError) as caught:
        convert(folder, folder.parent / "b", to=to, **options)
    message = str(caught.value)
    assert "\n" not in message, what
    assert len(message) < 1000, what
    assert message.startswith(str(folder)), (what, message)
    assert sorted(folder.parent.iterdir()) == before, what
    return message


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
def test_fields_of_the_header_with_hostile_values_are_refused(folder, seed):
    header, data = split((folder / FILE).read_bytes())
    same = json.dumps(header)
    cases = [case for case in changed_headers(header) if json.dumps(case[1]) != same]
    for what, changed in random.Random(seed).sample(cases, 60):
        (folder / FILE).write_bytes(joined(changed, data))
        assert FILE in refusal(folder, f"{what} (seed {seed})")


def test_headers_that_are_not_what_the_format_says_are_refused(folder):
    header, data = split((folder / FILE).read_bytes())
    for what, text in texts(json.dumps(header).encode(), header):
        (folder / FILE).write_bytes(joined(text, data))
        assert FILE in refusal(folder, what)


def test_a_file_cut_off_or_too_long_is_refused(folder):
    raw = (folder / FILE).read_bytes()
    for cut in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        (folder / FILE).write_bytes(raw[:cut])
        refusal(folder, cut)
    (folder / FILE).write_bytes(raw + b"\0")
    refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.weight", "layers.0.attention.wq/../../x.weight", "/etc/passwd", "layers.0.attention.wq", "", ".",
        "layers.00.attention.wq.weight", "layers.1.attention.wq.weight", "layers.-1.attention.wq.weight", "x" * 3000,
        "layers.#.attention.wq.weight", "layers.0.attention.wq.weight.weight", "layers.٠.attention.wq.weight",
        "layers.0.attention.wq.\n", "layers.0.attention.wq.weight\0", "layers.4294967296.attention.wq.weight",
        "layers.0.attention.wq.weightx", "layers.0.attention.wq.weight_scale_inv", "norm.lora_A.weight",
        "model.layers.0.self_attn.q_proj.weight", "norm..weight",
        "layers.0.attention.wq.\u202eweight", "layers.0.experts.0.w1.weight", "vision_encoder.ln_pre.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_a_tensor_of_another_name_is_refused(folder, name, to):
    header, data = split((folder / FILE).read_bytes())
    end = len(data)
    header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [end, end + 16]}
    (folder / FILE).write_bytes(joined(header, data + bytes(16)))
    assert FILE in refusal(folder, name, to)


@pytest.mark.parametrize("name", ["layers." + "0." * 2_000_000, "a." * 2_000_000 + "weight", "layers." * 600_000])
@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_name_of_megabytes_takes_no_time(tmp_path, name, layout):
    write_tiny_checkpoint(tmp_path / "a", CONFIG, layout)
    file = {"mistral": FILE, "hf": "model.safetensors"}[layout]
    header, data = split((tmp_path / "a" / file).read_bytes())
    header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
    (tmp_path / "a" / file).write_bytes(joined(header, data + bytes(16)))
    began = time.monotonic()
    assert file in refusal(tmp_path / "a")
    assert time.monotonic() - began < 5


def test_one_tensor_under_two_prefixes_is_refused(tmp_path):
    tensors = write_example(tmp_path / "a", EXAMPLES["mistral"](), "hf")
    twice = {"model.language_model.norm.weight": tensors["model.norm.weight"]}
    save_file(tensors | twice, tmp_path / "a" / "model.safetensors")
    assert "is norm.weight, which" in refusal(tmp_path / "a", to="mistral")


def test_experts_both_fused_and_apart_are_refused(tmp_path):
    tensors = write_example(tmp_path / "a", EXAMPLES["small_4"](), "hf")
    apart = {"model.layers.0.mlp.experts.0.down_proj.weight": np.zeros((64, 32), tensors["model.norm.weight"].dtype)}
    save_file(tensors | apart, tmp_path / "a" / "model.safetensors")
    assert "expected one of the two" in refusal(tmp_path / "a", to="mistral")


@pytest.mark.parametrize("shape", [(0, 64, 32), (4, 63, 32), (4, 64), (4, 64, 32, 1), (5, 64, 64), (3, 64, 64), ()])
def test_fused_experts_of_another_shape_are_refused(tmp_path, shape):
    tensors = write_example(tmp_path / "a", EXAMPLES["small_4"](), "hf")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.zeros(shape, tensors[name].dtype)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    refusal(tmp_path / "a", to="mistral")


@pytest.mark.parametrize("change", [{"n_layers": 4096}, {"n_heads": 4, "n_kv_heads": 2}, {"head_dim": 4}, {"dim": 8}])
def test_a_config_that_does_not_fit_is_refused(folder, change):
    document = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(document | change))
    assert "by params.json" in refusal(folder)


def test_counts_without_end_take_neither_time_nor_memory(folder):
    document = json.loads((folder / "params.json").read_text())
    moe = {"num_experts": 2**31 - 1, "num_experts_per_tok": 1}
    (folder / "params.json").write_text(json.dumps(document | {"n_layers": 4096, "moe": moe}))
    tracemalloc.start()
    began = time.monotonic()
    refusal(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 5
    assert peak < 50 * 10**6


class TestTheIndex:
    INDEX = "model.safetensors.index.json"

    @pytest.fixture
    def sharded(self, tmp_path) -> Path:
        weights = write_tiny_checkpoint(tmp_path / "whole", CONFIG)
        (tmp_path / "source").mkdir()
        save_hf(tmp_path / "source" / "a", weights, CONFIG, max_shard_bytes=4000)
        return tmp_path / "source" / "a"

    @pytest.mark.parametrize(
        "name", ["../whole/consolidated.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors"]
    )
    def test_a_file_outside_the_folder_is_refused(self, sharded, name):
        index = json.loads((sharded / self.INDEX).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        (sharded / self.INDEX).write_text(json.dumps(index))
        assert self.INDEX in refusal(sharded, name, "mistral")

    def test_a_link_out_of_the_folder_is_refused(self, sharded, tmp_path):
        shard = sorted(sharded.glob("model-*"))[0]
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
        assert "a link out of the folder" in refusal(sharded, to="mistral")


@pytest.mark.parametrize("name", ["tekken.json", "README.md", "tokenizer.model.v3"])
def test_links_and_pipes_are_not_carried_along(folder, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (folder / name).symlink_to(tmp_path / "secret")
    assert "not a regular file of its folder" in refusal(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file of its folder" in refusal(folder)


def test_a_link_within_a_hub_cache_is_carried_along(folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "1234"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    folder.rename(snapshot.parent.parent / "moved") and snapshot.parent.mkdir()
    (snapshot.parent.parent / "moved").rename(snapshot)
    (tmp_path / "models--x" / "blobs" / "aa").write_text("{}")
    (snapshot / "tekken.json").symlink_to(Path("../../blobs/aa"))
    convert(snapshot, tmp_path / "b", to="hf")
    assert (tmp_path / "b" / "tekken.json").read_text() == "{}"
    assert not (tmp_path / "b" / "tekken.json").is_symlink()


def manifests(document: dict[str, Any]) -> list[str]:
    deep = '{"format": "ministral-jax conversion 1", "documents": ' + '{"a":' * 5000 + "1" + "}" * 5001
    wrong = [{**document, "documents": value} for value in (None, 1, [], "x", {"mistral": 1}, {"hf": []})]
    return [deep, "", "[", "null", *map(json.dumps, wrong)]


def test_a_damaged_manifest_is_refused(folder, tmp_path):
    convert(folder, tmp_path / "h", to="hf")
    path = tmp_path / "h" / "conversion.json"
    for text in manifests(json.loads(path.read_text())):
        path.write_text(text)
        assert "conversion.json: " in refusal(tmp_path / "h", text[:80], "mistral")


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
def test_a_kept_config_that_was_damaged_is_refused_or_not_used(folder, tmp_path, seed):
    convert(folder, tmp_path / "h", to="hf")
    path = tmp_path / "h" / "conversion.json"
    document = json.loads(path.read_text())
    for damage in damaged_documents(document["documents"], seed, per_field=2):
        if damage.leaf in ("mistral", "hf"):
            continue
        path.write_text(json.dumps(document | {"documents": json.loads(damage.text)}))
        try:
            convert(tmp_path / "h", tmp_path / "m", to="mistral", force=True)
        except MinistralError as problem:
            assert "\n" not in str(problem), damage  # noqa: PT017


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
def test_a_damaged_journal_is_refused_or_begun_anew(folder, tmp_path, seed, monkeypatch):
    from ministral_jax.checkpoints.conversion import convert as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "b", to="hf")
    journal = tmp_path / "b.partial" / "journal.jsonl"
    raw = journal.read_bytes()
    for damaged in damaged_bytes(raw, seed, 5):
        (tmp_path / "b.partial" / "new").mkdir(parents=True, exist_ok=True)
        journal.write_bytes(damaged)
        try:
            convert(folder, tmp_path / "b", to="hf", verify=True)
        except CheckpointError as problem:
            assert "\n" not in str(problem)  # noqa: PT017
            assert "partial" in str(problem)  # noqa: PT017
        else:
            (tmp_path / "b" / "model.safetensors").unlink()
            for path in (tmp_path / "b").iterdir():
                path.unlink()
            (tmp_path / "b").rmdir()
