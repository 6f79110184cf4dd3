"""`ministral inspect`: folders, configs alone, the catalog; files by headers. Sizes are held against arrays."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from infer.generate import PAGE_SIZE, PREFILL_CHUNK
from ministral_jax.cache import allocate_cache, plan_cache
from ministral_jax.cli import main
from ministral_jax.config_files import read_config
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON document of an inspection that succeeds."""
    capsys.readouterr()
    code = main(["inspect", *arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.count("\n") == 1
    return json.loads(captured.out)


def test_parameters_and_bytes_are_those_of_the_files(checkpoint, capsys):
    document = inspect(capsys, str(checkpoint))
    tensors = load_file(checkpoint / "consolidated.safetensors")
    assert document["memory"]["parameters"]["total"] == sum(tensor.size for tensor in tensors.values())
    assert document["memory"]["weight_bytes"]["float32"] == sum(tensor.nbytes for tensor in tensors.values())
    assert document["files"] == {
        "names": ["consolidated.safetensors"],
        "tensors": len(tensors),
        "bytes_by_dtype": {"F32": sum(tensor.nbytes for tensor in tensors.values())},
        "mismatch": None,
    }


def test_the_cache_is_planned_as_generation_allocates_it(checkpoint, capsys):
    document = inspect(capsys, str(checkpoint), "--context", "300", "--batch", "2", "--dtype", "float32")
    config = read_config(checkpoint)
    dtype = np.dtype(np.float32)
    plan = plan_cache(config, batch=2, length=300, chunk=PREFILL_CHUNK, page_size=PAGE_SIZE, dtype=dtype)
    assert document["memory"]["cache_bytes"] == allocate_cache(config, plan, dtype).n_bytes
    assert [group["window"] for group in document["memory"]["groups"]] == [None, 5]
    assert [group["layers"] for group in document["memory"]["groups"]] == [[0], [1, 2, 3]]


def test_a_float8_cache_is_half_of_a_bfloat16_one(capsys):
    wide, narrow = (
        inspect(capsys, "ministral-8b-instruct-2410", "--cache-dtype", dtype)["memory"]["cache_bytes"]
        for dtype in ("bfloat16", "float8_e4m3fn")
    )
    assert wide == 2 * narrow


def test_a_published_name_needs_no_files(capsys):
    document = inspect(capsys, "ministral-8b-instruct-2410", "--context", "131072")
    memory = document["memory"]
    assert memory["parameters"]["total"] == 8_019_808_256
    assert document["files"] is None
    assert document["config"]["windows"] == [None, 32768, 32768, 32768] * 9
    full, windowed = (group["n_bytes"] for group in memory["groups"])
    page = 2 * 8 * 128 * 2 * 64
    assert full == 9 * (131072 // 64 + 1) * page
    assert 27 * 32768 // 64 * page < windowed < 27 * 34000 // 64 * page


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_config_file_alone_is_enough(layout, tmp_path, capsys):
    write_tiny_checkpoint(tmp_path, tiny_config("ministral"), layout)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    document = inspect(capsys, str(tmp_path))
    assert document["files"] is None
    assert document["config"]["windows"] == [None, 5, 5, 5]


def test_no_weights_are_read(bare_checkpoint, tmp_path, capsys):
    """Bytes of weights that are rubbish change nothing; only headers count."""
    shutil.copytree(bare_checkpoint, tmp_path, dirs_exist_ok=True)
    expected = inspect(capsys, str(bare_checkpoint))
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header] + b"\xff" * (len(data) - header))
    assert inspect(capsys, str(tmp_path))["files"] == expected["files"]


def test_files_that_do_not_fit_the_config_are_reported_and_end_with_1(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path, tiny_config("ministral"))
    tensors = load_file(tmp_path / "consolidated.safetensors")
    tensors["norm.weight"] = np.ones(63, np.float32)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "they          do not fit the config: " in captured.out
    assert "norm.weight" in captured.err
    assert captured.err.count("\n") == 1


def test_a_model_whose_layers_are_not_built_is_described(capsys):
    memory = inspect(capsys, "mixtral-8x7b-v0.1")["memory"]
    assert memory["parameters"]["total"] == 46_702_792_704
    assert memory["parameters"]["active"] < memory["parameters"]["total"] / 3


def test_windows_replace_those_of_the_config(capsys):
    model = "ministral-8b-instruct-2410"
    assert set(inspect(capsys, model, "--windows", "full")["config"]["windows"]) == {None}
    assert inspect(capsys, model, "--windows", "7")["config"]["windows"] == [7] * 36
    assert main(["inspect", model, "--windows", "wavy"]) == 1
    assert "wavy" in capsys.readouterr().err
    assert main(["inspect", model, "--windows", "none,x"]) == 2
    assert "--windows 'none,x'" in capsys.readouterr().err


def test_an_unknown_name_is_one_line_with_the_nearest(capsys):
    assert main(["inspect", "ministral-9b-instruct-2410"]) == 1
    captured = capsys.readouterr()
    assert "ministral-8b-instruct-2410" in captured.err
    assert captured.err.count("\n") == 1


def test_ministral_3b_was_never_published(capsys):
    assert main(["inspect", "ministral-3b-2410"]) == 1
    assert "never published" in capsys.readouterr().err


def test_a_context_beyond_the_models_is_refused(capsys):
    assert main(["inspect", "mistral-7b-v0.3", "--context", "32769"]) == 1
    assert "--context 32769: expected at most 32768" in capsys.readouterr().err


def test_the_table_says_what_the_document_says(checkpoint, capsys):
    memory = inspect(capsys, str(checkpoint))["memory"]
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert f"  in all        {memory['parameters']['total']:,}\n" in out
    assert "they          fit the config" in out
    assert "1 layer with full attention" in out
    assert "3 layers with a window of 5" in out
