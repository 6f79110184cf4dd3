"""Conversion as a process: killed at random moments, short of disk, and the memory it takes."""

import json
import math
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ministral_jax.checkpoints.conversion.expected import modules
from ministral_jax.config_files import write_params_json
from tests.architecture_files import make, write_example
from tests.checkpoint_files import tiny_config

ROOT = Path(__file__).parents[4]
SHARD = 3_000_000
SEED = random.SystemRandom().randrange(2**32)


def command(source: Path, target: Path, *options: str, verb: str = "convert") -> list[str]:
    arguments = [verb, str(source), str(target), "--to", "hf", "--max-shard-size", str(SHARD), *options]
    return [sys.executable, "-m", "ministral_jax.cli", *arguments]


CONVERT, QUANTIZE = ("convert",), ("quantize", "--format", "int8")


# A file may grow to the first argument; the others are the command. Set there, since forking this process is not safe.
LIMITED = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.argv[2], sys.argv[2:])
"""


def run(source: Path, target: Path, *options: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    full = [*prefix, *command(source, target, *options)]
    return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """About 40 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("source") / "a"
    config = tiny_config(dim=512, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=2048, vocab_size=8192, n_layers=4)
    write_example(folder, make(config), "mistral")
    (folder / "tekken.json").write_text("{}")
    return folder


def undisturbed(source: Path, target: Path, verb: str, *options: str) -> tuple[dict[str, bytes], float]:
    """What an undisturbed run writes, and the seconds it takes from its first trace on disk."""
    ran = subprocess.Popen(command(source, target, *options, verb=verb), cwd=ROOT, stdout=subprocess.DEVNULL)
    began = first_trace(target, ran)
    assert ran.wait(120) == 0
    return contents(target), time.monotonic() - began


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def first_trace(target: Path, ran: subprocess.Popen[bytes]) -> float:
    while not target.with_name(f"{target.name}.partial").exists() and not target.exists() and ran.poll() is None:
        time.sleep(0.002)
    return time.monotonic()


def kill_and_repeat(source: Path, target: Path, seconds: float, verb: str, *options: str) -> str:
    """Kills a run after `seconds` of work and starts it again; returns what was there when it was killed."""
    whole = command(source, target, *options, verb=verb)
    ran = subprocess.Popen(whole, cwd=ROOT, stdout=subprocess.DEVNULL)
    first_trace(target, ran)
    time.sleep(seconds)
    ran.send_signal(signal.SIGKILL)
    ran.wait(10)
    partial = target.with_name(f"{target.name}.partial")
    if target.exists() and not partial.exists():
        return "complete"
    found = f"{len(list(partial.glob('new/*.safetensors')))} files"
    again = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert not partial.exists()
    return found


def killed_at_random(source: Path, folder: Path, times: int, what: tuple[str, ...]) -> None:
    files, seconds = undisturbed(source, folder / "whole", *what)
    draw = random.Random(SEED)
    for i in range(times):
        after = draw.uniform(0, 1.1 * seconds)
        found = kill_and_repeat(source, folder / f"b{i}", after, *what)
        assert contents(folder / f"b{i}") == files, f"seed {SEED}: killed after {after:.3f} s with {found}"
        shutil.rmtree(folder / f"b{i}")


def test_a_run_that_was_killed_is_finished_by_the_next_to_the_same_bytes(source, tmp_path):
    killed_at_random(source, tmp_path, 3, CONVERT)


@pytest.mark.long
def test_a_quantisation_that_was_killed_is_finished_by_the_next_to_the_same_bytes(source, tmp_path):
    killed_at_random(source, tmp_path, 3, QUANTIZE)


@pytest.mark.slow
@pytest.mark.parametrize("what", [CONVERT, QUANTIZE], ids=lambda what: what[0])
def test_twenty_runs_that_were_killed_are_finished_by_the_next_to_the_same_bytes(source, tmp_path, what):
    killed_at_random(source, tmp_path, 20, what)


def test_a_file_that_the_system_refuses_to_grow_is_one_line_and_gets_no_name(source, tmp_path):
    ran = run(source, tmp_path / "b", prefix=(sys.executable, "-c", LIMITED, str(SHARD // 2)))
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"ministral: {tmp_path / 'b.partial'}")
    assert "cannot be written (File too large)" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "b").exists()


# The interpreter, numpy, two buffers, a reordered and a cast piece: 35 MB, and room for other versions.
MOST_BYTES = 100 * 10**6


def write_sparse(folder: Path, vocab_size: int, n_layers: int) -> None:
    """A checkpoint of zeros in float32 that takes no room on disk."""
    sizes = {"dim": 1024, "n_heads": 8, "n_kv_heads": 2, "head_dim": 128, "hidden_dim": 4096, "vocab_size": vocab_size}
    config = tiny_config(**sizes, n_layers=n_layers)
    folder.mkdir()
    header, end = {}, 0
    for name, shape in modules(config):
        begin, end = end, end + 4 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "consolidated.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    write_params_json(config, folder / "params.json")


def peak_bytes(source: Path, target: Path, to: str, dtype: str | None = None) -> int:
    """The most anonymous and shared memory of a process that converts."""
    program = (
        "import json, sys; from benchmarks.convert import measured;"
        "from ministral_jax.checkpoints.conversion.convert import convert;"
        "to, dtype = json.loads(sys.argv[3]);"
        "print(json.dumps(measured(lambda: convert(sys.argv[1], sys.argv[2], to=to, dtype=dtype))))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(source), str(target), json.dumps([to, dtype])],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)["peak_bytes"]


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    write_sparse(tmp_path / "a", vocab_size=16384, n_layers=9)
    assert (tmp_path / "a" / "consolidated.safetensors").stat().st_size > 4 * MOST_BYTES
    assert peak_bytes(tmp_path / "a", tmp_path / "b", "hf", "bfloat16") < MOST_BYTES


@pytest.mark.long
def test_orbax_has_no_whole_tensor_in_memory(tmp_path):
    """jax and orbax take 80 MB, what is on its way to disk 64 MB twice, and what is read again less."""
    write_sparse(tmp_path / "a", vocab_size=120_000, n_layers=1)
    largest = 4 * 120_000 * 1024
    assert peak_bytes(tmp_path / "a", tmp_path / "b", "orbax") < 0.75 * largest
    assert peak_bytes(tmp_path / "b", tmp_path / "c", "hf") < 0.75 * largest
