"""Runs that are killed at random moments and gone on with end as one that nothing stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .tiny_run import learned, write_base

STEPS = 60
SECONDS = 240  # until a step is given up waiting for


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after every step, so that most moments are in the middle of writing one."""
    folder = tmp_path_factory.mktemp("killed")
    write_base(folder)
    document = {
        "model": str(folder),
        "run_dir": "set by the command",
        "data": {"instruct_data": str(folder / "chats.jsonl")},
        "lora": {"rank": 4, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.01},
        "max_steps": STEPS,
        "seq_len": 32,
        "batch_size": 4,
        "checkpoints": {"every": 1, "keep": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    return folder / "run.yaml"


def start(run_file: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """`ministral finetune --resume`, on one device, its compiled programs kept."""
    command = [sys.executable, "-m", "ministral_jax.cli", "finetune", str(run_file), "--resume"]
    environment = os.environ | {"XLA_FLAGS": "", "MINISTRAL_CACHE": str(run_file.parent / "cache")}
    with (run_dir.with_suffix(".log")).open("ab") as log:
        return subprocess.Popen(
            [*command, "--set", f"run_dir={run_dir}"], stdout=log, stderr=log, env=environment, cwd=Path.cwd()
        )


def steps_told(run_dir: Path) -> int:
    """The last step in the metrics; a row that is being written does not count."""
    metrics = run_dir / "metrics.train.jsonl"
    whole = metrics.read_text().rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(whole.splitlines()[-1])["step"] if whole else 0


def kill_at_random(process: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> bool:
    """Kills the run within a tenth of a second of a step near by, or while it starts; False if it ended before."""
    goal = steps_told(run_dir) + draw.choice((0, 1, 1, 2, 3))
    give_up = time.monotonic() + SECONDS
    while steps_told(run_dir) < goal and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.slow)], ids=str
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    kills: int, run_file: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(run_file, whole).wait(SECONDS) == 0, whole.with_suffix(".log").read_text()
    draw, half_written, hit = random.Random(kills), 0, 0
    while hit < kills:
        hit += kill_at_random(start(run_file, killed), killed, draw)
        assert not (killed / "final").exists(), f"ended after {hit} kills: take more steps"
        half_written += any((killed / "checkpoints").glob("*.partial"))
    print(f"{hit} kills, {half_written} of them in the middle of a checkpoint; {steps_told(killed)} steps told")
    assert start(run_file, killed).wait(SECONDS) == 0, killed.with_suffix(".log").read_text()
    assert learned(killed) == learned(whole)
    assert [row[0] for row in learned(killed)] == list(range(1, STEPS + 1))
    name = "final/lora.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert not list((killed / "checkpoints").glob("*.partial"))
