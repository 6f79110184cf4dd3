"""`ministral convert` and `ministral diff` as a person or a script calls them."""

import argparse
import json
from pathlib import Path

import pytest

from ministral_jax.cli import main
from ministral_jax.cli.convert import byte_count


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_there_and_back_is_the_same_and_says_so(capsys, checkpoint, tmp_path):
    code, out, err = run(capsys, "convert", checkpoint, tmp_path / "hf", "--to", "hf", "--verify")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'hf'}: 39 tensors, ")
    assert "model.safetensors\n" in out
    assert (tmp_path / "hf" / "tekken.json").read_bytes() == (checkpoint / "tekken.json").read_bytes()
    assert run(capsys, "diff", checkpoint, tmp_path / "hf") == (0, "39 tensors, all the same\n", "")


def test_json_is_one_document(capsys, checkpoint, tmp_path):
    options = ("--to", "hf", "--max-shard-size", "100kB", "--dtype", "bfloat16", "--json")
    _, planned, _ = run(capsys, "convert", checkpoint, tmp_path / "hf", *options, "--dry-run")
    assert not (tmp_path / "hf").exists()
    _, done, _ = run(capsys, "convert", checkpoint, tmp_path / "hf", *options)
    assert json.loads(planned) | {"dry_run": False} == json.loads(done)
    files = json.loads(done)["files"]
    assert all((tmp_path / "hf" / name).stat().st_size == size for name, size in files.items())
    code, out, _ = run(capsys, "diff", checkpoint, tmp_path / "hf", "--json")
    document = json.loads(out)
    assert (code, document["same"], document["tensors"]) == (1, False, 39)
    assert all(entry["a"].startswith("float32") for entry in document["differences"])
    assert all(entry["b"].startswith("bfloat16") for entry in document["differences"])


def test_a_folder_that_exists_is_one_line_and_exit_code_1(capsys, checkpoint, tmp_path):
    (tmp_path / "hf").mkdir()
    code, out, err = run(capsys, "convert", checkpoint, tmp_path / "hf", "--to", "hf")
    assert (code, out) == (1, "")
    assert err == f"ministral: {tmp_path / 'hf'}: exists; expected a new name, or --force to replace it\n"
    assert run(capsys, "convert", checkpoint, tmp_path / "hf", "--to", "hf", "--force")[0] == 0


def test_each_tensor_that_differs_has_a_line(capsys, checkpoint, bare_checkpoint):
    code, out, err = run(capsys, "diff", checkpoint, bare_checkpoint)
    assert (code, err) == (1, "")
    assert "tok_embeddings.weight: float32" in out
    assert out.count("\n") < 45


def test_a_missing_folder_is_one_line(capsys, tmp_path):
    code, _, err = run(capsys, "diff", tmp_path / "nothing", tmp_path / "nothing")
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("2gib", 2 * 2**30), ("100k", 100_000)]
)
def test_sizes_are_read_with_their_units(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "5XB", "1e9", "GB", "٣GB", "0.1"])
def test_other_sizes_are_wrong_usage(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected bytes such as 2GB"):
        byte_count(text)


def test_a_terminal_sees_a_bar_and_a_pipe_nothing(checkpoint: Path, tmp_path: Path):
    import os
    import pty
    import subprocess
    import sys

    owner, terminal = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "ministral_jax.cli",
        "convert",
        str(checkpoint),
        str(tmp_path / "hf"),
        "--to",
        "hf",
    ]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, timeout=60, cwd=Path(__file__).parents[3])
    os.close(terminal)
    shown = os.read(owner, 65536).decode(errors="replace")
    os.close(owner)
    assert ran.returncode == 0
    assert "converting" in shown
