"""`ministral quantize` from end to end on tiny models."""

import json
import math

import pytest

from ministral_jax.cli import main
from tests.architecture_files import SMALL_4, make, write_example
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

LINES = '{"ids": [1, 5, 9, 2, 77, 31, 8, 64]}\n\n{"ids": [1, 3, 4]}\n'


@pytest.fixture
def dense(tmp_path):
    write_tiny_checkpoint(tmp_path / "dense", tiny_config(n_layers=1), "mistral", dtype="bfloat16")
    (tmp_path / "lines.jsonl").write_text(LINES)
    return tmp_path


def quantized(dense, capsys, *options):
    assert main(["quantize", str(dense / "dense"), str(dense / "out"), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_calibration_gives_static_scales_and_both_perplexities(dense, capsys):
    found = quantized(dense, capsys, "--format", "fp8", "--calibrate", str(dense / "lines.jsonl"))
    assert found["perplexity"]["before"] == pytest.approx(perplexity(dense / "dense", capsys), rel=1e-5)
    assert found["perplexity"]["after"] == pytest.approx(perplexity(dense / "out", capsys), rel=1e-5)
    assert found["perplexity"]["before"] != found["perplexity"]["after"]
    assert json.loads((dense / "out" / "params.json").read_text())["quantization"]["qscheme_act"] == "TENSOR"
    assert len(found["errors"]) == 7
    assert found["bytes"] < found["bytes_before"]


def perplexity(folder, capsys):
    """From the logprobs that `ministral score` prints."""
    logprobs = []
    for ids in ("1,5,9,2,77,31,8,64", "1,3,4"):
        assert main(["score", str(folder), "--ids", ids, "--json"]) == 0
        logprobs += json.loads(capsys.readouterr().out)["logprobs"][1:]
    return math.exp(-sum(logprobs) / len(logprobs))


def test_without_data_the_errors_of_layers_are_shown(dense, capsys):
    assert main(["quantize", str(dense / "dense"), str(dense / "out"), "--format", "nf4", "--to", "hf"]) == 0
    out = capsys.readouterr().out
    assert "in the hf layout" in out
    assert "perplexity" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("     0  ")]
    assert line.split()[1::2] == ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    assert all(0.05 < float(error) < 0.12 for error in line.split()[2::2])


def test_errors_of_experts_are_shown_as_one(tmp_path, capsys):
    write_example(tmp_path / "dense", make(SMALL_4), "mistral")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--format", "fp8-block"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("     1  ")]
    assert line.split()[1::2] == [
        *("wq_b", "wkv_b", "wo"),
        *(f"{kind}.{part}" for kind in ("experts", "shared_experts") for part in ("w1", "w2", "w3")),
    ]
    document = json.loads((tmp_path / "out" / "params.json").read_text())["quantization_config"]
    assert document["config_groups"]["group_0"]["weights"]["block_structure"] == [128, 128]


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--format", "int8", "--double-quantization"], 2, "expected with --format nf4, not int8"),
        (
            ["--format", "fp8", "--calibrate", "{lines}.bad"],
            1,
            'line 1: expected {"text": "..."} or {"ids": [1, 5, 9]}',
        ),
        (["--format", "fp8", "--calibrate", "{lines}.none"], 1, "holds no lines"),
        (["--format", "fp8", "--calibrate", "{lines}.json"], 1, "line 1 is not JSON"),
        (["--format", "fp8", "--calibrate", "{lines}.big"], 1, "token id 999 to calibrate with: expected 0 to 127"),
    ],
)
def test_what_cannot_be_done_is_one_line(dense, capsys, options, code, expected):
    lines = str(dense / "lines.jsonl")
    for suffix, text in (("bad", '{"ids": []}'), ("none", "\n"), ("json", "{"), ("big", '{"ids": [999]}')):
        (dense / f"lines.jsonl.{suffix}").write_text(text)
    options = [option.replace("{lines}", lines) for option in options]
    assert main(["quantize", str(dense / "dense"), str(dense / "out"), *options]) == code
    *notes, error = capsys.readouterr().err.splitlines()
    assert expected in error
    assert all("loaded as" in note for note in notes)
    assert not (dense / "out").exists()
