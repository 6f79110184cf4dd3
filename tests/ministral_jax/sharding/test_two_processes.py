"""Two processes of four devices each load, generate and train as one does with eight devices, and with one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.ministral_jax.sharding.whole_path import whole_path

RUNNER = Path(__file__).with_name("whole_path.py")
REPOSITORY = Path(__file__).parents[3]
MESH = "fsdp=4,tensor=2"  # process 0 has the first two of fsdp, process 1 the others
CLOSE = 1e-5


def in_two_processes(folder: Path, results: Path) -> list[dict[str, np.ndarray]]:
    """What `whole_path` gives in either process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(REPOSITORY),
    }
    files = [results / f"{process_id}.npz" for process_id in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(RUNNER), str(folder), MESH, str(file), coordinator, str(process_id)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process_id, file in enumerate(files)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ended
    assert [out for out, _ in ended] == [json.dumps({"devices": 8}) + "\n", ""]
    return [dict(np.load(file)) for file in files]


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Ids equal, numbers to 1e-5 of their range."""
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"own bytes"}:
        wanted = expected[name]
        if wanted.dtype.kind == "f":
            scale = float(np.ptp(wanted) if wanted.ndim else abs(wanted))
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=CLOSE * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.long
def test_two_processes_load_generate_and_train_as_one_does(tmp_path):
    folder = tmp_path / "model"
    write_tiny_checkpoint(folder, tiny_config("ministral", n_layers=2))
    first, second = in_two_processes(folder, tmp_path)
    one_device, eight_devices = whole_path(folder, None), whole_path(folder, MESH)
    for found in (first, second, eight_devices):
        assert_same(found, one_device)
    assert one_device["finite"].all()

    whole = int(one_device["own bytes"][1])
    for read, own in (first["own bytes"], second["own bytes"]):
        assert read == own  # no byte that its devices do not have, and none twice
        assert 0.5 * whole <= own < 0.55 * whole  # half of each matrix; norms are everyone's
