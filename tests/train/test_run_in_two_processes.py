"""A run in two processes of four devices each, by the command line, is the run of one device."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from train.metrics import TRAIN_FILE

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


def write_run(folder: Path, **more: Any) -> Path:
    """A run of a tiny model, evaluated and with a checkpoint after every step."""
    write_base(folder)
    chats = str(folder / "chats.jsonl")
    document = {
        "model": str(folder),
        "run_dir": "set by the command",
        "data": {"instruct_data": chats, "eval_instruct_data": chats},
        # Steps so small that rounding is not blown up from one to the next.
        "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-2},
        "max_steps": STEPS,
        "seq_len": 32,
        "batch_size": 4,
        "eval": {"every": 2},
        "checkpoints": {"every": 1, "keep": 3, "best": False},
        "samples": {"prompts": ["the 3"], "max_tokens": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document | more))
    return folder / "run.yaml"


def started_together(run_file: Path, run_dir: Path) -> list[subprocess.Popen[str]]:
    """Two processes of four devices each."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    together = ("--mesh", "fsdp=4,tensor=2", "--coordinator", coordinator, "--processes", "2", "--process-id")
    flags = ONE_DEVICE.replace("=1", "=4")
    return [started(run_file, run_dir, *together, str(process), flags=flags) for process in (0, 1)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("trained", "result"),
    [({"lora": {"rank": 4, "dropout": 0.1}}, "lora"), ({"full": True}, "consolidated")],
    ids=["adapters", "all weights"],
)
def test_two_processes_write_what_one_does(trained: dict[str, Any], result: str, tmp_path: Path) -> None:
    """Losses, evaluations, the result, and checkpoints after every step, each finished while the next is computed."""
    run_file = write_run(tmp_path, **trained)
    one, two = tmp_path / "one", tmp_path / "two"
    require_done(started(run_file, one))
    require_done(*started_together(run_file, two))
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


@pytest.mark.long
@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_counts_if_the_first_process_gets_it(signalled: int, tmp_path: Path) -> None:
    """Then both save and leave, and what the other one got alone changes nothing."""
    run_file, run_dir = write_run(tmp_path, max_steps=12), tmp_path / "run"
    processes = started_together(run_file, run_dir)
    give_up = time.monotonic() + SECONDS
    while not (run_dir / TRAIN_FILE).exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    processes[signalled].send_signal(signal.SIGTERM)
    require_done(*processes)
    last = rows(run_dir)[-1]["step"]
    assert (run_dir / f"checkpoints/step_{last:06d}").is_dir()
    assert (last < 12) == (signalled == 0)
    assert (run_dir / "final").exists() == (signalled == 1)
