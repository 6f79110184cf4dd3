"""Ranks block sizes of the TPU flash kernels without a TPU, by the instruction bundles that the compiler schedules.

    ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu python benchmarks/tpu_block_sizes.py --chip v6e --kernel forward

Each candidate is compiled by libtpu in a process of its own, which dumps how full every bundle is. Printed per
candidate: bundles, the share of matrix-unit, vector and spill slots in use, and a `cost` for each of three windows:
bundles per 2^17 scores, times the scores computed per score that is visible. Lower is better. It counts instructions
once, however often they run, and knows nothing of memory (the length of a key block does not show): it ranks like with
like and is no timing. Not for other kernels than these.
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
    "key_block": (1024,),
    "key_tile": (256, 512, 1024),
    "lanes": (128, 256),
}
RANKED_WINDOWS = (1024, 4096, None)


def child(chip: str, kernel: str, window: int | None, sizes: list[int]) -> None:
    """Compiles the kernel alone with these sizes, for the dump's sake. Its arrays are laid out already."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.tpu import flash
    from pallas_kernels.tpu.ahead_of_time import compile_for
    from pallas_kernels.tpu.block_sizes import BlockSizes, KernelBlocks
    from pallas_kernels.tpu.flash_backward import Operands, dkv_call, dq_call
    from pallas_kernels.tpu.flash_forward import forward_call

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    blocks = BlockSizes(*sizes)
    settings = flash.Settings(window, H**-0.5, 0, KernelBlocks(blocks, blocks, blocks), False)
    queries, keys, row = array(1, K, N // K, T, H), array(1, K, T, H), array(1, K, N // K, 1, T, dtype=jnp.float32)

    def planned() -> Any:
        positions = flash.Positions(jnp.int32(0), None, None)
        return flash._plan(settings, kernel, positions, array(1, T, N, H), array(1, T, K, H), array(1, T, K, H))  # pyright: ignore

    def forward(q: Any, k: Any, v: Any) -> Any:
        call, scalars, segments = planned()
        return forward_call(call, scalars, q, k, v, segments)

    def backward(operands: Operands) -> Any:
        call, scalars, segments = planned()
        return (dq_call if kernel == "dq" else dkv_call)(call, scalars, operands, segments)

    if kernel == "forward":
        compile_for(chip, forward, queries, keys, array(1, K, H, T))  # pyright: ignore[reportArgumentType]
    else:
        compile_for(chip, backward, Operands(queries, queries, row, row, keys, keys))  # pyright: ignore


def read_utilization(path: Path) -> dict[str, float]:
    """Bundles, and the share of slots in use by unit, of one dumped kernel."""
    lines = path.read_text().splitlines()
    names = [name.strip() for name in lines[1].split(",")]
    capacity = [int(x) for x in lines[2].split()]
    rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
    used = [sum(column) for column in zip(*rows, strict=True)]
    share = {n: u / (c * len(rows)) for n, u, c in zip(names, used, capacity, strict=True)}
    units = {"mxu": "MXU", "valu": "VALU", "spill_stores": "VSTORE:SPILL", "spill_loads": "VLOAD:FILL"}
    return {"bundles": len(rows), **{name: round(share[unit], 4) for name, unit in units.items()}}


def computed_per_visible(query_block: int, key_tile: int, window: int | None) -> float:
    """Scores that are computed, in whole tiles, for each one that is visible."""
    tiles = 0
    for first in range(0, T, query_block):
        oldest = 0 if window is None else max(first - window + 1, 0)
        tiles += -(-(first + query_block) // key_tile) - oldest // key_tile
    reach = min(window or T, T)
    return tiles * key_tile * query_block / (reach * (reach + 1) // 2 + (T - reach) * reach)


def measure(chip: str, kernel: str, window: int | None, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Static utilization of one kernel with these sizes, or the reason why it does not compile."""
    names = ("query_rows", "key_block", "key_tile", "lanes")
    found: dict[str, Any] = {"chip": chip, "kernel": kernel, "window": window, **dict(zip(names, sizes, strict=True))}
    with tempfile.TemporaryDirectory() as dump:
        wanted = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*utilization.*"
        flags = f"--xla_jf_dump_to={dump} {wanted}"
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
    per_score = found["bundles"] * 2**17 / (rows * tile)
    costs = {str(w): per_score * computed_per_visible(rows // (N // K), tile, w) for w in RANKED_WINDOWS}
    return {**found, "cost": {w: round(cost, 1) for w, cost in costs.items()}}


def table_sizes(chip: str, kernel: str) -> tuple[int, int, int, int]:
    """The sizes that the package uses for this chip."""
    from pallas_kernels.tpu.block_sizes import TABLE

    return dataclasses.astuple(getattr(TABLE[chip], kernel))  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=("v5e", "v6e", "tpu7x"), default="v6e")
    parser.add_argument("--kernel", choices=("forward", "dq", "dkv"), default="forward")
    parser.add_argument("--window", type=int, default=1024, help="to compile for; 0 for none")
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
    heads = "".join(f"{f'W={w}':>8}" for w in RANKED_WINDOWS)
    print(f"{'rows,block,tile,lanes':>24} {'bundles':>8} {'mxu':>5} {'valu':>5} {'spill':>5} cost:{heads}")
    for sizes in candidates:
        found = measure(arguments.chip, arguments.kernel, arguments.window or None, sizes)
        write(found)
        name = ",".join(map(str, sizes))
        if "error" in found:
            print(f"{name:>24} {found['error']}", flush=True)
            continue
        shares = " ".join(f"{100 * found[key]:4.0f}%" for key in ("mxu", "valu", "spill_stores"))
        costs = "".join(f"{cost:>8.0f}" for cost in found["cost"].values())
        print(f"{name:>24} {found['bundles']:>8} {shares}      {costs}", flush=True)


def write(result: dict[str, Any]) -> None:
    """Adds a result to the file, replacing that of the same candidate."""

    def key(found: dict[str, Any]) -> tuple[Any, ...]:
        names = ("chip", "kernel", "window", "query_rows", "key_block", "key_tile", "lanes")
        return tuple(found[n] or 0 for n in names)

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    merged = {**{key(x): x for x in kept}, key(result): result}
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    rows = ",\n".join(json.dumps(merged[k]) for k in sorted(merged))
    partial.write_text(f"[\n{rows}\n]\n")
    os.replace(partial, RESULTS)


if __name__ == "__main__":
    main()
