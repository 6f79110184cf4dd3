"""Failures of the command line: exit codes, one line each, nothing heavy before it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ministral_jax.cli import build_parser, generate, main

HOME = Path(__file__).parents[3]
HEAVY = ("jax", "numpy", "rich", "mistral_common", "flax", "infer.generate", "huggingface_hub")


def run_python(*arguments: str, cwd: Path = HOME) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ministral_jax.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: print(end.code)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = run_python("-c", code)
    assert result.stdout.splitlines()[-2:] == ["0", "[]"]
    assert all(f"    {name}" in result.stdout for name in ("demo", "chat", "generate", "score", "inspect"))


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    declared = next(line for line in (HOME / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert capsys.readouterr().out == f"ministral {json.loads(declared.partition('= ')[2])}\n"


@pytest.mark.parametrize("command", ["demo", "chat", "generate", "score", "inspect"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    assert f"\nexample:\n  ministral {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["score"],
        ["score", "m"],
        ["score", "m", "--ids", "1,x"],
        ["score", "m", "--ids", "1,-2"],
        ["score", "m", "--ids", "1", "--text", "a"],
        ["generate", "m", "--ids", "1", "--max-tokens", "0"],
        ["generate", "m", "--ids", "1", "--dtype", "int8"],
    ],
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert capsys.readouterr().out == ""


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments):
        raise error

    monkeypatch.setattr(generate, "open_model", lambda *_, **__: broken(None))


def test_a_fault_of_the_program_shows_its_type_and_offers_debug(monkeypatch, capsys):
    fail_with(KeyError("layers"), monkeypatch)
    assert main(["generate", "m", "--ids", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ministral: unexpected KeyError: 'layers'")
    assert "run again with --debug for the traceback" in captured.err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    fail_with(KeyError("layers"), monkeypatch)
    assert main(["generate", "m", "--ids", "1", "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert "in broken" in error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/x/params.json"), "ministral: /x/params.json: Permission denied"),
        (OSError(28, "No space left on device"), "ministral: No space left on device"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, monkeypatch, capsys):
    fail_with(error, monkeypatch)
    assert main(["generate", "m", "--ids", "1"]) == 1
    assert capsys.readouterr().err == line + "\n"


def test_out_of_memory_says_what_to_try(monkeypatch, capsys):
    device_error = type("JaxRuntimeError", (RuntimeError,), {})
    fail_with(device_error("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nlong report"), monkeypatch)
    assert main(["generate", "m", "--ids", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ministral: out of memory: try --max-length N")
    assert error.count("\n") == 1


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["generate", "m", "--ids", "1"]) == 130
    assert capsys.readouterr().err == "\nministral: interrupted\n"


@pytest.mark.parametrize("command", ["generate", "score", "inspect"])
@pytest.mark.parametrize("model", ["/nowhere/at/all", "./missing"])
def test_a_missing_folder_is_one_line(command, model, capsys):
    assert main([command, model, *([] if command == "inspect" else ["--ids", "1"])]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"ministral: {model}: no such folder")
    assert captured.err.count("\n") == 1


def test_a_damaged_file_is_one_line_that_names_it(bare_checkpoint, tmp_path):
    for file in bare_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    result = run_python("-m", "ministral_jax.cli", "score", str(tmp_path), "--ids", "1,2", "--json")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"ministral: {weights}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "infer"])
def test_a_file_that_hides_a_package_is_named(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file ran')")
    result = run_python("-m", "ministral_jax.cli", "score", "m", "--ids", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"ministral: {tmp_path / name}.py hides the package {name} of ministral-jax")
    assert result.stderr.count("\n") == 1


def test_the_front_door_names_a_file_that_hides_a_package(tmp_path):
    (tmp_path / "infer.py").write_text("")
    result = run_python("-c", "import ministral_jax; ministral_jax.Generator", cwd=tmp_path)
    assert f"MinistralError: {tmp_path / 'infer.py'} hides the package infer" in result.stderr


def test_a_reader_that_leaves_causes_no_complaint(bare_checkpoint):
    command = [sys.executable, "-m", "ministral_jax.cli", "score", str(bare_checkpoint), "--ids", "1,2,3"]
    ours = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HOME, env={**os.environ, "PYTHONPATH": str(HOME)}
    )
    assert ours.stdout is not None
    assert ours.stderr is not None
    ours.stdout.close()
    complaint = ours.stderr.read()
    assert ours.wait() == 141
    assert b"Error" not in complaint
    ours.stderr.close()


def test_characters_that_the_output_cannot_show_are_replaced(checkpoint):
    command = [sys.executable, "-m", "ministral_jax.cli", "score", str(checkpoint), "--text", "你"]
    environment = {**os.environ, "PYTHONPATH": str(HOME), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, cwd=HOME, env=environment)
    assert result.returncode == 0, result.stderr
    assert b"'?'" in result.stdout


def test_no_command_hides_debug():
    for command in ("chat", "generate", "score", "inspect"):
        given = ["--ids", "1"] if command in ("generate", "score") else []
        assert build_parser().parse_args([command, "m", *given, "--debug"]).debug
