"""The decode loop of Ministral 8B, two periods deep at full width, compiled for absent chips. Nothing is run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

LAYERS = 8  # two periods of full, windowed, windowed, windowed

pytestmark = [pytest.mark.aot]


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None or jax.__version_info__ < (0, 11)
    return pytest.mark.skipif(missing, reason=f"{module} is missing, or jax is older than 0.11")


@pytest.mark.parametrize(
    "chip",
    [
        pytest.param("v5e", marks=needs("libtpu")),
        pytest.param("v6e", marks=needs("libtpu")),
        pytest.param("tpu7x", marks=needs("libtpu")),
        pytest.param("h200", marks=needs("jax_cuda13_plugin")),
    ],
)
def test_a_decode_step_updates_its_cache_in_place_and_holds_less_than_one_weight_besides(
    chip: str, tmp_path: Path
) -> None:
    """In a process of its own, where shapes are not checked: the arguments are abstract."""
    out = tmp_path / "aot.json"
    command = ["benchmarks/aot.py", "--rows", "0", "--layers", str(LAYERS), "--chips", chip, "--out", str(out)]
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (row,) = json.loads(out.read_text())
    assert row["length"] == 131072
    assert row["pool_bytes"] > 1e9
    assert row["aliased_bytes"] >= row["pool_bytes"]
    assert row["temporary_bytes"] < row["largest_weight_bytes"]
    assert row["kernel_calls"] == LAYERS
