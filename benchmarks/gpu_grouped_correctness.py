"""grouped_matmul's Hopper kernels on the device against the float32 definition, with both gradients. It times nothing.

    python benchmarks/gpu_grouped_correctness.py [--part 1/6] [--interpret]

Ragged groups, empty ones among them; NaN in rows of no group, and in the matrices of empty groups where no gradient is
asked for. Prints one line per case with the largest differences, as shares of the largest value, and exits with 1 if
any exceeds what 16-bit rounding explains. `--interpret` runs a few cases in the interpreter on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_correctness import run_sweep, share
from pallas_kernels import grouped_matmul, grouped_matmul_fp8


@dataclasses.dataclass(frozen=True)
class Case:
    """Group sizes, rows past the last group, widths."""

    sizes: tuple[int, ...]
    beyond: int = 0
    n_out: int = 512
    n_in: int = 512
    dtype: str = "bfloat16"
    eight_bits: bool = False


EDGES = [(n,) for n in (1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 193, 257)]
RAGGED = ((5, 0, 70, 1), (0, 0, 300, 0), (129, 255, 1, 64), (1,) * 40, (0,) * 4)
SWEEP = [
    *(Case(sizes) for sizes in EDGES),
    *(Case(sizes, beyond) for sizes in RAGGED for beyond in (0, 1, 100)),
    *(Case((37, 0, 200), 5, *widths) for widths in ((64, 64), (64, 4096), (192, 320), (640, 128), (4096, 64))),
    *(Case(sizes, 3, dtype="float16") for sizes in RAGGED),
    Case((900, 3, 0, 1100, 40, 5), 0, 768, 640),
    Case(tuple(int(n) for n in np.random.default_rng(2).multinomial(1500, np.ones(128) / 128)), 11, 256, 256),
]
SWEEP += [
    *(Case(sizes, 3, n_out, n_in, eight_bits=True) for sizes in RAGGED for n_out, n_in in ((128, 128), (384, 1024))),
    Case((900, 3, 0, 1100, 40, 5), 0, 768, 640, eight_bits=True),
]
INTERPRETED = [Case((5, 0, 70, 1), 3, 128, 64), Case((150,), 1, 64, 128), Case((70,), 1, 128, 256, eight_bits=True)]


def errors(case: Case, interpret: bool) -> dict[str, float]:
    """Largest difference from the definition of the product and of the gradients by x and w."""
    if case.eight_bits:
        return {"out": error_of_eight_bits(case, interpret)}
    rng, rows = np.random.default_rng(0), sum(case.sizes)
    n_rows = max(rows + case.beyond, 1)
    x, d_out = (rng.normal(size=(n_rows, width)) for width in (case.n_in, case.n_out))
    x[rows:] = d_out[rows:] = np.nan
    w = rng.normal(size=(len(case.sizes), case.n_out, case.n_in))
    arrays = [jnp.asarray(array, case.dtype) for array in (x, w, d_out)]
    sizes = jnp.asarray(case.sizes, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def results(implementation: str, x: Any, w: Any, d_out: Any) -> tuple[jax.Array, ...]:
        settings: Any = {"implementation": implementation, "interpret": interpret and implementation != "reference"}
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **settings), x, w)
        unread = jnp.where((sizes > 0)[:, None, None], w, jnp.nan)
        return out, *pull(d_out), grouped_matmul(x, unread, sizes, **settings)

    got = results("pallas_gpu", *arrays)
    d_wide = jnp.where(jnp.arange(n_rows)[:, None] < rows, arrays[2], 0).astype(jnp.float32)
    wanted = results("reference", *(array.astype(jnp.float32) for array in arrays[:2]), d_wide)
    names = ("out", "dx", "dw", "unread")
    return {name: share(a, b) for name, a, b in zip(names, got, (*wanted[:3], wanted[0]), strict=True)}


def error_of_eight_bits(case: Case, interpret: bool) -> float:
    """The same of e4m3 numbers with a scale for each block; NaN in rows of no group and in unread matrices."""
    rng, rows, blocks = np.random.default_rng(0), sum(case.sizes), case.n_in // 128
    x = rng.normal(size=(max(rows + case.beyond, 1), case.n_in))
    x[rows:] = np.nan
    w = rng.normal(size=(len(case.sizes), case.n_out, case.n_in))
    scales = (rng.uniform(0.5, 2, size=shape) for shape in ((len(x), blocks), (len(w), case.n_out // 128, blocks)))
    x_scale, w_scale = (jnp.asarray(scale, jnp.float32) for scale in scales)
    sizes, x8 = jnp.asarray(case.sizes, jnp.int32), jnp.asarray(x, jnp.float8_e4m3fn)
    w8, hit = jnp.asarray(w, jnp.float8_e4m3fn), np.array(case.sizes)[:, None, None] > 0
    unread = jnp.asarray(np.where(hit, w, np.nan), jnp.float8_e4m3fn)
    got = jax.jit(functools.partial(grouped_matmul_fp8, interpret=interpret))(x8, x_scale, unread, w_scale, sizes)
    return share(got, grouped_matmul_fp8(x8, x_scale, w8, w_scale, sizes, implementation="reference"))


if __name__ == "__main__":
    run_sweep(__doc__ or "", SWEEP, INTERPRETED, errors)
