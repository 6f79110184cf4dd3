"""Conversion against a plain copy of the same bytes, in the same run: seconds, GB/s, their ratio, and peak memory.

    python benchmarks/convert.py [--gigabytes 4] [--repeats 3] [--folder /tmp] [--orbax] [--smoke]

Writes a synthetic checkpoint in the mistral layout, then in turn copies its file (read and write of 2 MiB, fsync) and
converts it to the HF layout, in one file as the copy is (queries and keys reordered, SHA-256 of all that is written,
fsync), each in a process of its own, which reports its memory. Needs twice the size free. The page cache is warm.
With --orbax, it is also converted to orbax once, and from there to the HF layout; needs three times the size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "convert.json"
COPY_BYTES = 2 * 2**20
SAMPLE_SECONDS = 0.01
# What a conversion may hold beside its largest tensor.
ALLOWANCE = 500 * 10**6


def write_source(folder: Path, gigabytes: float) -> int:
    """A dense checkpoint of about that size in bfloat16; returns the bytes of its largest tensor."""
    from ministral_jax.checkpoints.conversion.expected import modules
    from ministral_jax.checkpoints.safetensors_writer import TensorSpec, write_safetensors
    from ministral_jax.config import ModelConfig, RopeConfig
    from ministral_jax.config_files import write_params_json

    dim = 4096 if gigabytes >= 1 else 512
    layer_bytes = 2 * (2 * dim * dim + 2 * dim * dim // 4 + 3 * dim * 3 * dim)
    embedding_rows = 32768 if gigabytes >= 1 else 1024
    n_layers = max(1, round((gigabytes * 1e9 - 4 * embedding_rows * dim) / layer_bytes))
    config = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=dim // 128,
        n_kv_heads=dim // 512,
        head_dim=128,
        hidden_dim=3 * dim,
        vocab_size=embedding_rows,
        norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        windows=(None,) * n_layers,
        max_length=32768,
    )
    folder.mkdir()
    bfloat16 = np.dtype("bfloat16")
    specs = {f"{name}.weight": TensorSpec(bfloat16, shape) for name, shape in modules(config)}
    largest = max(spec.n_bytes for spec in specs.values())
    noise = np.random.default_rng(0).integers(0, 2**16, largest // 2, np.uint16).view(bfloat16)
    produce = lambda name: noise[: specs[name].n_bytes // 2].reshape(specs[name].shape)  # noqa: E731
    write_safetensors(folder / "consolidated.safetensors", specs, produce)
    write_params_json(config, folder / "params.json")
    return largest


def memory() -> dict[str, int]:
    """Bytes of this process: anonymous and shared memory now, and the most that was ever resident."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    in_bytes = {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "VmHWM")}
    return {"anonymous_and_shared": in_bytes["RssAnon"] + in_bytes["RssShmem"], "VmHWM": in_bytes["VmHWM"]}


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of `work`, by the clock and of processors, and the most memory that a sampler saw meanwhile."""
    peak, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], memory()["anonymous_and_shared"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    began, busy = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    over.set()
    sampler.join()
    return {"seconds": seconds, "cpu_seconds": busy, "peak_bytes": peak[0], "VmHWM": memory()["VmHWM"]}


def copy(source: Path, target: Path) -> None:
    """What the conversion is compared with: the same bytes, unchanged."""
    buffer = memoryview(bytearray(COPY_BYTES))
    target.mkdir()
    with (
        open(source / "consolidated.safetensors", "rb", buffering=0) as one,
        open(target / "consolidated.safetensors", "wb", buffering=0) as other,
    ):
        while count := one.readinto(buffer):
            other.write(buffer[:count])
        os.fsync(other.fileno())


def run_side(side: str, source: Path, target: Path) -> None:
    """One side, in this process; prints what was measured."""
    if side == "copy":
        print(json.dumps(measured(lambda: copy(source, target))))
        return
    from ministral_jax.checkpoints.conversion.convert import convert

    to = "orbax" if side == "orbax" else "hf"
    print(json.dumps(measured(lambda: convert(source, target, to=to, max_shard_bytes=2**60))))


def in_own_process(side: str, source: Path, target: Path, *, keep: bool = False) -> dict[str, float]:
    """What was measured of one side; removes what it wrote, unless it is to be kept."""
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--target", str(target)]
    root = str(Path(__file__).parent.parent)
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root})
    if not keep:
        shutil.rmtree(target)
    return json.loads(ran.stdout)


def compare(folder: Path, gigabytes: float, repeats: int, *, orbax: bool) -> dict[str, object]:
    """Both sides in turn, `repeats` times; the fastest of each. With `orbax`, there and from there once."""
    source, target = folder / "source", folder / "target"
    largest = write_source(source, gigabytes)
    n_bytes = (source / "consolidated.safetensors").stat().st_size
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "convert": []}
    for _ in range(repeats):
        for side, results in runs.items():
            results.append(in_own_process(side, source, target))
    through_orbax = {}
    if orbax:
        through_orbax["to"] = in_own_process("orbax", source, folder / "orbax", keep=True)
        through_orbax["from"] = in_own_process("convert", folder / "orbax", target)
    seconds = {side: min(run["seconds"] for run in results) for side, results in runs.items()}
    peak = max(run["peak_bytes"] for run in runs["convert"])
    return {
        "bytes": n_bytes,
        "largest_tensor": largest,
        "runs": runs,
        "seconds": seconds,
        "cpu_seconds": {side: min(run["cpu_seconds"] for run in results) for side, results in runs.items()},
        "gb_per_second": {side: n_bytes / 1e9 / spent for side, spent in seconds.items()},
        "speed_of_copy": seconds["copy"] / seconds["convert"],
        "peak_bytes": peak,
        "allowed_bytes": largest + ALLOWANCE,
        "VmHWM": max(run["VmHWM"] for run in runs["convert"]),
        "orbax": through_orbax,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "safetensors": version("safetensors"),
    }


def show(result: dict) -> None:
    print(f"{result['bytes'] / 1e9:.2f} GB, largest tensor {result['largest_tensor'] / 1e6:.0f} MB")
    for side in ("copy", "convert"):
        print(
            f"{side:<8} {result['seconds'][side]:7.2f} s  {result['gb_per_second'][side]:6.2f} GB/s, "
            f"{result['cpu_seconds'][side]:6.2f} s of processors"
        )
    print(f"convert runs at {result['speed_of_copy']:.2f} of the copy")
    print(
        f"peak anonymous and shared {result['peak_bytes'] / 1e6:.0f} MB, allowed {result['allowed_bytes'] / 1e6:.0f}, "
        f"VmHWM {result['VmHWM'] / 1e6:.0f} MB"
    )
    for side, run in result["orbax"].items():
        print(
            f"{side} orbax: {run['seconds']:.2f} s, peak anonymous and shared {run['peak_bytes'] / 1e6:.0f} MB, "
            f"VmHWM {run['VmHWM'] / 1e6:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--orbax", action="store_true", help="to orbax and from it, too")
    parser.add_argument("--smoke", action="store_true", help="20 MB, once, nothing kept")
    parser.add_argument("--side", choices=("copy", "convert", "orbax"), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.source, arguments.target)
        return
    gigabytes, repeats = (0.02, 1) if arguments.smoke else (arguments.gigabytes, arguments.repeats)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = compare(Path(folder), gigabytes, repeats, orbax=arguments.orbax)
    show(result)
    if not arguments.smoke:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
