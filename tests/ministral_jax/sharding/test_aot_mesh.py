"""Models on meshes of absent chips, two periods of layers at full width: they compile, fit, and copy no weight."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from ministral_jax.catalog import find

pytestmark = [pytest.mark.aot]

BENCHMARK = Path("benchmarks/aot_mesh.py")
RESULTS = Path("benchmarks/results/aot_mesh.json")
RECORDED: dict[str, Any] = {row["name"]: row for row in json.loads(RESULTS.read_text())}
# Copies that XLA may make: far less than a weight as a device has it, 12 MB and up.
DECODE_TEMPORARIES = 64e6
# What a step with experts may send: logits and activations, far less than the matrices of one layer.
DECODE_MOVED = 32e6


def needed(name: str) -> list[pytest.MarkDecorator]:
    module = "jax_cuda13_plugin" if "h200" in name else "libtpu"
    missing = importlib.util.find_spec(module) is None or jax.__version_info__ < (0, 11)
    return [pytest.mark.skipif(missing, reason=f"{module} is missing, or jax is older than 0.11")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=needed(name)) for name in RECORDED])
def test_a_program_compiles_and_fits_its_chips(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, where shapes are not checked: the arguments are abstract."""
    command = [sys.executable, str(BENCHMARK), "--rows", name, "--short"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert "error" not in found, found["error"]
    assert found["fits"]
    if found["kind"] == "decode":
        assert found["temporary_bytes"] < DECODE_TEMPORARIES
        experts = find(found["model"]).config.moe
        if experts is None:  # two in a layer, and one of the embeddings; the logits are gathered
            assert found["collectives"] == {"all-gather": 1, "all-reduce": 2 * found["layers"] + 1}
        else:  # tokens travel there and back, no weight does
            travels = 2 * (found["layers"] - experts.first_dense_layers)
            assert found["collectives"]["ragged-all-to-all"] == travels
            assert found["moved_bytes"] < DECODE_MOVED
    if found["hash"] != RECORDED[name]["hash"]:
        with capfd.disabled():
            print(f"\n{name}: out of date, {RECORDED[name]['hash']} was recorded and {found['hash']} is")
