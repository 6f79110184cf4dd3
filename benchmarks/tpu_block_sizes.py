"""Ranks block sizes of the TPU flash kernels without a TPU, by the instruction bundles that the compiler schedules.

    ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu python benchmarks/tpu_block_sizes.py --chip v6e --kernel forward

Each candidate is compiled by libtpu in a process of its own, which dumps how full every bundle is. Printed per
candidate: bundles, the share of matrix-unit, vector and spill slots in use, and `cost`: bundles per 2^17 scores, times
the share of computed scores that a window leaves unused. Lower is better. It counts instructions once, however often
they run, and knows nothing of memory: it ranks like with like and is no timing. Not for other kernels than these.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

N, K, H, T = 32, 8, 128, 8192
RESULTS = Path(__file__).parent / "results" / "tpu_block_sizes.json"
CANDIDATES = {
    "query_rows": (1024, 2048, 4096),
    "key_block": (1024, 2048),
    "key_tile": (256, 512, 1024),
    "lanes": (128, 256),
}


def child(chip: str, kernel: str, window: int, sizes: list[int]) -> None:
    """Compiles the kernel with these sizes, for the dump's sake."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu.ahead_of_time import compile_for
    from pallas_kernels.tpu.block_sizes import BlockSizes, KernelBlocks
    from pallas_kernels.tpu.flash import flash_attention_tpu

    def forward(q: Any, k: Any, v: Any) -> Any:
        blocks = BlockSizes(*sizes)
        return flash_attention_tpu(
            q,
            k,
            v,
            window=window,
            query_segments=None,
            key_segments=None,
            query_offset=0,
            scale=H**-0.5,
            block_sizes=KernelBlocks(blocks, blocks, blocks),
        )

    def gradients(q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1]((out, lse))

    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (N, K))
    if kernel == "forward":
        compile_for(chip, forward, q, k, k)
    else:
        index = 0 if kernel == "dq" else slice(1, 3)
        lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)
        compile_for(chip, lambda *x: gradients(*x)[index], q, k, k, q, lse)


def read_utilization(path: Path) -> dict[str, float]:
    """Bundles, and the share of slots in use by unit, of one dumped kernel."""
    lines = path.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(x) for x in lines[2].split()]
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    used = [sum(column) for column in zip(*rows, strict=True)]
    share = {n: u / (c * len(rows)) for n, u, c in zip(names, used, capacity, strict=True)}
    return {
        "bundles": len(rows),
        "mxu": share["MXU"],
        "valu": share["VALU"],
        "spill_stores": share["VSTORE:SPILL"],
        "spill_loads": share["VLOAD:FILL"],
    }


def measure(chip: str, kernel: str, window: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Static utilization of one kernel with these sizes, or the reason why it does not compile."""
    names = ("query_rows", "key_block", "key_tile", "lanes")
    found: dict[str, Any] = {"chip": chip, "kernel": kernel, "window": window, **dict(zip(names, sizes, strict=True))}
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        environment = {
            **os.environ,
            "LIBTPU_INIT_ARGS": flags,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": f"{chip}-1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        command = [sys.executable, __file__, "--child", json.dumps([chip, kernel, window, sizes])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        pattern = f"*flash_attention_{kernel}*final_hlo-static-per-bundle-utilization.txt"
        dumped = sorted(Path(dump).rglob(pattern))
        if done.returncode or not dumped:
            return {**found, "error": (done.stderr.strip().splitlines() or ["nothing was dumped"])[-1][:200]}
        found |= read_utilization(dumped[0])
    rows, _, tile, _ = sizes
    wasted = 1 + (rows // (N // K) + tile) / window
    return {**found, "cost": found["bundles"] * 2**17 / (rows * tile) * wasted}


def table_sizes(chip: str, kernel: str) -> tuple[int, int, int, int]:
    """The sizes that the package uses for this chip."""
    from pallas_kernels.tpu.block_sizes import TABLE

    return dataclasses.astuple(getattr(TABLE[chip], kernel))  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=("v5e", "v6e", "tpu7x"), default="v6e")
    parser.add_argument("--kernel", choices=("forward", "dq", "dkv"), default="forward")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sizes", nargs="*", help="candidates as rows,block,tile,lanes; default: all; 'table': ours")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        chip, kernel, window, sizes = json.loads(arguments.child)
        child(chip, kernel, window, sizes)
        return
    candidates = [tuple(x) for x in itertools.product(*CANDIDATES.values())]
    if arguments.sizes:
        ours = table_sizes(arguments.chip, arguments.kernel)
        candidates = [ours if x == "table" else tuple(int(n) for n in x.split(",")) for x in arguments.sizes]
    print(f"{'rows,block,tile,lanes':>24} {'bundles':>8} {'mxu':>5} {'valu':>5} {'spill':>6} {'cost':>7}")
    for sizes in candidates:
        found = measure(arguments.chip, arguments.kernel, arguments.window, sizes)
        write(found)
        name = ",".join(map(str, sizes))
        if "error" in found:
            print(f"{name:>24} {found['error']}", flush=True)
            continue
        shares = " ".join(f"{100 * found[key]:4.0f}%" for key in ("mxu", "valu", "spill_stores"))
        print(f"{name:>24} {found['bundles']:>8} {shares} {found['cost']:>8.0f}", flush=True)


def write(result: dict[str, Any]) -> None:
    """Adds a result to the file, replacing that of the same candidate."""

    def key(found: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(found[n] for n in ("chip", "kernel", "window", "query_rows", "key_block", "key_tile", "lanes"))

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    merged = {**{key(x): x for x in kept}, key(result): result}
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps([merged[k] for k in sorted(merged)], indent=1) + "\n")
    os.replace(partial, RESULTS)


if __name__ == "__main__":
    main()
