"""The Hopper kernels on the device against the dense float32 definition, over a sweep of shapes. It times nothing.

    python benchmarks/gpu_correctness.py [--part 1/6] [--interpret]

Prints one line per case with the largest difference of out, lse and gradients, as a share of the largest value, and
exits with 1 if any exceeds what 16-bit rounding explains. `--interpret` runs a few cases in the interpreter on a CPU.
Most of the time goes into compiling: `--part 1/6` takes every sixth case, so that six processes can share the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--interpret" in sys.argv:
    # The interpreter's callbacks run jax themselves: with the few threads of one CPU device they wait for each other.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.flash import flash_attention_gpu
from pallas_kernels.reference import flash_attention_reference

TOLERANCE = {"bfloat16": 0.012, "float16": 0.002}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `packed` draws segment lengths at random."""

    queries: int = 640
    keys: int = 640
    heads: int = 4
    kv_heads: int = 1
    width: int = 128
    value_width: int = 128
    window: int | None = None
    offset: int = 0
    packed: bool = False
    dtype: str = "bfloat16"


SWEEP = [
    *(Case(window=window) for window in (None, 1, 63, 64, 100, 128, 129, 300, 5000)),
    *(Case(600, 600, window=window) for window in (None, 70)),
    *(Case(1, 1), Case(5, 5), Case(127, 127, window=3), Case(129, 129)),
    *(Case(width=width, value_width=width, window=window) for width in (64, 96, 192, 256) for window in (None, 100)),
    *(Case(width=192, value_width=128, window=window) for window in (None, 100)),
    Case(width=80, value_width=72),
    *(Case(heads=heads, kv_heads=kv, window=100) for heads, kv in ((1, 1), (8, 8), (8, 2), (16, 1))),
    *(Case(200, 700, offset=500, window=window) for window in (None, 150)),
    *(Case(300, 100, offset=-50), Case(300, 100, offset=-400, window=20), Case(200, 100, offset=50, window=30)),
    *(Case(1000, 1000, packed=True, window=window) for window in (None, 90)),
    *(Case(dtype="float16", window=window) for window in (None, 100)),
    Case(4096, 4096, 8, 2, window=1024),
    Case(4096, 4096, 8, 2),
]
INTERPRETED = [Case(100, 100, 2, 1, 64, 64, window=30), Case(90, 90, 2, 1, 64, 64, packed=True)]


def segments_of(case: Case) -> jax.Array | None:
    if not case.packed:
        return None
    cuts = np.sort(np.random.default_rng(1).integers(1, case.keys, size=6))
    return jnp.asarray(np.searchsorted(cuts, np.arange(case.keys), side="right")[None], jnp.int32)


def errors(case: Case, interpret: bool) -> dict[str, float]:
    """Largest difference from the definition, as a share of the largest value, for both results and three gradients."""
    dtype = jnp.dtype(case.dtype)
    rng = np.random.default_rng(0)
    queries, keys = (1, case.queries, case.heads), (1, case.keys, case.kv_heads)
    shapes = (*queries, case.width), (*keys, case.width), (*keys, case.value_width), (*queries, case.value_width)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    segments = segments_of(case)
    settings: dict[str, Any] = {
        "window": case.window,
        "query_segments": segments,
        "key_segments": segments,
        "query_offset": case.offset,
        "scale": case.width**-0.5,
    }

    @functools.partial(jax.jit, static_argnums=0)
    def results(attend: Callable[..., Any], q: Any, k: Any, v: Any, d_out: Any) -> tuple[jax.Array, ...]:
        (out, lse), pull = jax.vjp(functools.partial(attend, **settings), q, k, v)
        return out, lse, *pull((d_out, jnp.where(jnp.isfinite(lse), 1.0, 0.0)))

    wanted = results(flash_attention_reference, *(x.astype(jnp.float32) for x in (q, k, v, d_out)))
    got = results(functools.partial(flash_attention_gpu, interpret=interpret), q, k, v, d_out)
    names = ("out", "lse", "dq", "dk", "dv")
    return {name: share(a, b) for name, a, b in zip(names, got, wanted, strict=True)}


def share(got: jax.Array, want: jax.Array) -> float:
    """Largest difference as a share of the largest value. Both -inf is equality; a NaN is infinitely far."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    difference = jnp.where(got == want, 0.0, jnp.abs(got - want))
    largest = jnp.abs(jnp.where(jnp.isfinite(want), want, 0.0)).max()
    share = float(difference.max() / jnp.maximum(largest, 1e-3))
    return share if share == share else float("inf")


def run_sweep(about: str, sweep: Sequence[Any], interpreted: Sequence[Any], errors: Callable[..., Any]) -> None:
    """The command line of a sweep: a line per case, exit code 1 if any is wrong. `errors(case, interpret)` compares."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--part", default="1/1", help="which share of the cases, as NUMBER/COUNT")
    arguments = parser.parse_args()
    number, count = (int(n) for n in arguments.part.split("/"))
    failed = 0
    for case in (interpreted if arguments.interpret else sweep)[number - 1 :: count]:
        found = errors(case, arguments.interpret)
        wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[case.dtype]}
        failed += bool(wrong)
        print("WRONG" if wrong else "right", {k: float(f"{v:.2g}") for k, v in found.items()}, case, flush=True)
    if failed:
        raise SystemExit(f"{failed} cases differ by more than {TOLERANCE}")


if __name__ == "__main__":
    run_sweep(__doc__ or "", SWEEP, INTERPRETED, errors)
