"""A run in two processes of four devices each, by the command line, is the run of one device."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from .tiny_run import learned, rows, write_base

STEPS = 4
SECONDS = 400
ONE_DEVICE = "--xla_force_host_platform_device_count=1"


def started(run_file: Path, run_dir: Path, *options: str, flags: str = ONE_DEVICE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ministral_jax.cli", "finetune", str(run_file), "--set", f"run_dir={run_dir}"]
    return subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path.cwd())},
    )


def require_done(*processes: subprocess.Popen[str]) -> None:
    try:
        ended = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), ended


@pytest.mark.long
@pytest.mark.parametrize(
    ("trained", "result"),
    [({"lora": {"rank": 4, "dropout": 0.1}}, "lora"), ({"full": True}, "consolidated")],
    ids=["adapters", "all weights"],
)
def test_two_processes_write_what_one_does(trained: dict[str, Any], result: str, tmp_path: Path) -> None:
    """Losses, evaluations, the result, and checkpoints after every step, each finished while the next is computed."""
    write_base(tmp_path)
    chats = str(tmp_path / "chats.jsonl")
    document = {
        "model": str(tmp_path),
        "run_dir": "set by the command",
        "data": {"instruct_data": chats, "eval_instruct_data": chats},
        **trained,
        # Steps so small that rounding is not blown up from one to the next.
        "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-2},
        "max_steps": STEPS,
        "seq_len": 32,
        "batch_size": 4,
        "eval": {"every": 2},
        "checkpoints": {"every": 1, "keep": 3, "best": False},
        "samples": {"prompts": ["the 3"], "max_tokens": 4},
    }
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(document))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    one, two = tmp_path / "one", tmp_path / "two"
    require_done(started(run_file, one))
    together = ("--mesh", "fsdp=4,tensor=2", "--coordinator", coordinator, "--processes", "2", "--process-id")
    flags = ONE_DEVICE.replace("=1", "=4")
    require_done(*(started(run_file, two, *together, str(process), flags=flags) for process in (0, 1)))
    np.testing.assert_allclose(learned(two), learned(one), rtol=1e-5)
    evaluated = [[row["loss"] for row in rows(run_dir, "metrics.eval.jsonl")] for run_dir in (one, two)]
    np.testing.assert_allclose(evaluated[1], evaluated[0], rtol=1e-5)
    assert rows(two, "samples.jsonl") == rows(one, "samples.jsonl")
    for run_dir in (one, two):
        checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert checkpoints == ["step_000002", "step_000003", "step_000004"]
    expected = load_file(one / f"final/{result}.safetensors")
    for name, array in load_file(two / f"final/{result}.safetensors").items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5 * np.ptp(expected[name]), err_msg=name)
