"""Opening models from the command line: compiled programs are kept between runs, notes say what was loaded."""

import os
import subprocess
import sys
from pathlib import Path

from ministral_jax.cli import main

HOME = Path(__file__).parents[3]


def test_compiled_programs_are_kept_where_they_are_told_to(bare_checkpoint, tmp_path):
    command = [sys.executable, "-m", "ministral_jax.cli", "score", str(bare_checkpoint), "--ids", "1,2,3"]
    environment = {**os.environ, "PYTHONPATH": str(HOME), "MINISTRAL_CACHE": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=HOME, env=environment)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("jit*"))


def test_the_dtype_is_said_on_stderr(bare_checkpoint, capsys):
    assert main(["score", str(bare_checkpoint), "--ids", "1,2,3", "--json"]) == 0
    assert capsys.readouterr().err == f"ministral: {bare_checkpoint}: stored as float32, loaded as float32\n"


def test_a_dtype_that_is_asked_for_is_used(bare_checkpoint, capsys):
    outputs = []
    for dtype in ("float32", "bfloat16"):
        assert main(["score", str(bare_checkpoint), "--ids", "1,2,3", "--json", "--dtype", dtype]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]
