"""paged_attention's Hopper kernel on the device against the float32 jnp path. It times nothing.

    python benchmarks/gpu_paged_correctness.py [--part 1/6] [--interpret]

Ragged batches over shuffled pages, with NaN in the null page, in free pages, behind windows and past lengths. Prints
one line per case with the largest difference of out and lse, as a share of the largest value, and exits with 1 if any
exceeds what 16-bit rounding explains. `--interpret` runs a few cases in the interpreter on a CPU.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_correctness import run_sweep, share
from pallas_kernels import paged_attention

ENTRY_SCALE = {"int8": 0.03, "float8_e4m3fn": 0.5}  # what an entry of an 8-bit pool is multiplied with


@dataclasses.dataclass(frozen=True)
class Case:
    """Of sequence b the last `counts[b]` of `lengths[b]` tokens are queries; 3 padding rows follow."""

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    window: int | None = None
    page: int = 64
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    dtype: str = "bfloat16"
    pool: str | None = None


DECODE = ((1, 5, 64, 65, 700, 4097, 0, 129), (1, 1, 1, 1, 1, 1, 0, 1))
PROMPTS = ((600, 1, 130, 0, 3000), (600, 1, 100, 0, 700))
MIXED = ((900, 64, 2500, 33), (300, 1, 1, 33))
SWEEP = [
    *(Case(*batch, window=window) for batch in (DECODE, PROMPTS, MIXED) for window in (None, 1, 63, 64, 100, 1000)),
    *(Case(*batch, window=150, page=page) for batch in (DECODE, MIXED) for page in (16, 32, 128, 256)),
    *(Case(*batch, window=150, width=width) for batch in (DECODE, MIXED) for width in (64, 96, 256)),
    *(Case(*batch, heads=heads, kv_heads=kv) for batch in (DECODE, MIXED) for heads, kv in ((8, 8), (16, 1), (24, 8))),
    *(Case(*batch, window=window, dtype="float16") for batch in (DECODE, MIXED) for window in (None, 100)),
    *(
        Case(*batch, window=window, pool=pool)
        for batch in (DECODE, PROMPTS)
        for pool in ENTRY_SCALE
        for window in (None, 100)
    ),
    Case((131072,), (1,)),
    Case((131072,), (1,), window=32768),
    Case((4096,) * 64, (1,) * 64, window=1024),
]
INTERPRETED = [Case((40, 17, 0), (1, 1, 0), 20, 16, 4, 2, 64), Case((40, 70), (9, 70), 30, 16, 2, 1, 64)]


def arrays(case: Case) -> dict[str, Any]:
    """Pages in random order; what no query may see is NaN (127 in int8 pools)."""
    rng = np.random.default_rng(0)
    entries = [-(-n // case.page) for n in case.lengths]
    n_pages = sum(entries) + 3
    order = 1 + rng.permutation(n_pages - 1)
    table = np.zeros((len(entries), max(entries)), np.int32)
    readable = np.zeros((n_pages, case.page), bool)
    used = 0
    for b, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        oldest = length if not count else max(length - count - (case.window or length) + 1, 0)
        for entry in range(oldest // case.page, entries[b]):
            page, used = order[used], used + 1
            table[b, entry] = page
            at = entry * case.page + np.arange(case.page)
            readable[page] = (at >= oldest) & (at < length)
    pools = []
    for _ in range(2):
        pool = rng.standard_normal((n_pages, case.page, case.kv_heads, case.width), np.float32)
        if case.pool is not None:
            pool = pool / ENTRY_SCALE[case.pool]
        if case.pool == "int8":
            pool = np.clip(np.rint(pool), -127, 127)
        hidden = 127 if case.pool == "int8" else np.nan
        pools.append(jnp.asarray(np.where(readable[:, :, None, None], pool, hidden), case.pool or case.dtype))
    queries = rng.standard_normal((sum(case.counts) + 3, case.heads, case.width), np.float32)
    return {
        "q": jnp.asarray(queries, case.dtype),
        "k_pages": pools[0],
        "v_pages": pools[1],
        "page_table": jnp.asarray(table),
        "query_starts": jnp.asarray(np.concatenate([[0], np.cumsum(case.counts)]), jnp.int32),
        "lengths": jnp.asarray(case.lengths, jnp.int32),
    }


def errors(case: Case, interpret: bool) -> dict[str, float]:
    """Largest difference from the jnp path in float32, as a share of the largest value."""
    call = arrays(case)
    scale = None
    if case.pool is not None:
        scale = ENTRY_SCALE[case.pool] * jnp.linspace(0.5, 1.5, case.kv_heads, dtype=jnp.float32)
    options: dict[str, Any] = {"window": case.window, "k_scale": scale, "v_scale": scale, "return_lse": True}
    got = paged_attention(*call.values(), **options, implementation="pallas_gpu", interpret=interpret)
    wide = {name: x.astype(jnp.float32) if x.dtype == jnp.dtype(case.dtype) else x for name, x in call.items()}
    wanted = paged_attention(*wide.values(), **options, implementation="xla")
    return {name: share(one, other) for name, one, other in zip(("out", "lse"), got, wanted, strict=True)}


if __name__ == "__main__":
    run_sweep(__doc__ or "", SWEEP, INTERPRETED, errors)
