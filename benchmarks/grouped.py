"""Products by group on a GPU: the Hopper kernels against torch's grouped_mm and XLA's ragged_dot, in one run.

    python benchmarks/grouped.py [--out benchmarks/results/NAME.json] [--limit SECONDS] [--smoke]

The shapes of one projection of Mixtral 8x7B and of a layer like Large 3's, from one token to 8192, whose experts are
drawn at random. Per shape and direction: milliseconds, TFLOP/s, bytes per second of the matrices that are hit, the
floor (operations over the chip's dense 16-bit rate, or bytes over its bandwidth, whichever is longer), their ratio, and
each peer's time. Before a shape is timed its product is compared with ragged_dot's. The file is written after each row.
A peer that is not installed or refuses a shape is skipped, and the reason kept. `--smoke` uses tiny shapes, runs on a
CPU and times ragged_dot in the place of the kernels: it checks this script, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import CHIPS, torch_wait
from benchmarks.timing import best_seconds, machine, write
from pallas_kernels import grouped_matmul, grouped_matmul_fp8

REPEATS = 16  # calls of one program where there are few rows, each waiting for the one before: launches do not count
FEW_ROWS = 512
DENSE_BYTES = 20e9  # ragged_dot holds every row once for every expert: it is left out beyond this
TOLERANCE = 0.02  # of the largest value: twice what bf16 rounding leaves


@dataclasses.dataclass(frozen=True)
class Shape:
    """The copies of `tokens`, one for each of their experts, times one projection."""

    tokens: int
    n_experts: int
    chosen: int
    n_out: int
    n_in: int
    direction: str = "product"  # or "gradient of x", "gradient of w"; "fp8 product" of numbers in blocks

    @property
    def rows(self) -> int:
        return self.tokens * self.chosen

    @property
    def repeats(self) -> int:
        return REPEATS if self.rows <= FEW_ROWS and "product" in self.direction else 1

    @property
    def number_bytes(self) -> float:
        return 1.0 if self.direction == "fp8 product" else 2.0

    def sizes(self) -> np.ndarray:
        """Rows of each expert, the experts of every token drawn at random."""
        scores = np.random.default_rng(0).random((self.tokens, self.n_experts))
        return np.bincount(np.argsort(scores)[:, : self.chosen].ravel(), minlength=self.n_experts)

    def operations(self) -> float:
        return 2.0 * self.rows * self.n_out * self.n_in

    def dense_bytes(self) -> float:
        """What ragged_dot makes of the rows."""
        return 2.0 * self.n_experts * self.rows * max(self.n_in, self.n_out)

    def matrix_bytes(self) -> float:
        """Of the experts that are hit; the gradient of w writes those of all."""
        hit = self.n_experts if self.direction == "gradient of w" else int((self.sizes() > 0).sum())
        return self.number_bytes * hit * self.n_out * self.n_in

    def floor_seconds(self) -> float | None:
        chip = next((rates for name, rates in CHIPS.items() if name in jax.devices()[0].device_kind), None)
        if chip is None:
            return None
        traffic = self.matrix_bytes() + self.rows * (self.number_bytes * self.n_in + 2.0 * self.n_out)
        return max(self.operations() * self.number_bytes / 2 / chip[0], traffic / chip[1])  # e4m3 has twice the rate


PROJECTIONS = ((14336, 4096), (4096, 14336))
DIRECTIONS = ("product", "gradient of x", "gradient of w")
DEFAULT = [
    *(Shape(8192, 8, 2, *widths, direction) for widths in PROJECTIONS for direction in DIRECTIONS),
    *(Shape(tokens, 8, 2, *widths) for tokens in (1, 8, 64, 512) for widths in PROJECTIONS),
    *(
        Shape(tokens, 128, 4, *widths, direction)
        for tokens in (8192, 64, 8)
        for widths in ((4096, 7168), (7168, 4096))
        for direction in ("fp8 product", "product")
    ),
]
SMOKE = [Shape(9, 4, 2, 128, 128, direction) for direction in (*DIRECTIONS, "fp8 product")]


def arrays(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, w, the gradient of the result, and the group sizes."""
    keys = jax.random.split(jax.random.key(0), 3)
    sides = (shape.rows, shape.n_in), (shape.n_experts, shape.n_out, shape.n_in), (shape.rows, shape.n_out)
    x, w, d_out = (jax.random.normal(key, side, jnp.bfloat16) for key, side in zip(keys, sides, strict=True))
    if shape.direction == "fp8 product":
        w = w.astype(jnp.float8_e4m3fn)
    return x, w, d_out, jnp.asarray(shape.sizes(), jnp.int32)


def of_jax(shape: Shape, implementation: str) -> Callable[..., jax.Array]:
    """What is asked of (x, w, d_out, sizes)."""

    def run(x: jax.Array, w: jax.Array, d_out: jax.Array, sizes: jax.Array) -> jax.Array:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return grouped_matmul(x, w, sizes, implementation=implementation)  # pyright: ignore[reportArgumentType]

        if shape.direction == "product":
            return product(x, w)
        if shape.direction == "fp8 product":
            return fp8_product(x, w, sizes, implementation)
        if shape.direction == "gradient of x":
            return jax.vjp(lambda x: product(x, w), x)[1](d_out)[0]
        return jax.vjp(lambda w: product(x, w), w)[1](d_out)[0]

    return run


def fp8_product(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: str) -> jax.Array:
    """Numbers in e4m3 with scales of 1: rounding x is a part of the call, w comes rounded."""
    x8 = x.astype(jnp.float8_e4m3fn)
    if implementation == "xla":
        return grouped_matmul(x8.astype(jnp.bfloat16), w.astype(jnp.bfloat16), sizes, implementation="xla")
    blocks, row_blocks = x.shape[1] // 128, w.shape[1] // 128
    x_scale, w_scale = jnp.ones((len(x), blocks)), jnp.ones((len(w), row_blocks, blocks))
    return grouped_matmul_fp8(x8, x_scale, w, w_scale, sizes)


def jax_seconds(shape: Shape, implementation: str, budget: float) -> float:
    """Of one call; several of one program wait for each other."""
    if implementation == "xla" and shape.dense_bytes() > DENSE_BYTES:
        raise RuntimeError(f"left out: it would take {shape.dense_bytes() / 1e9:.0f} GB")
    once = of_jax(shape, implementation)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, d_out: jax.Array, sizes: jax.Array) -> jax.Array:
        def after(_: int, x: jax.Array) -> jax.Array:
            return x + 0 * once(x, w, d_out, sizes).ravel()[0]

        if shape.repeats == 1:
            return once(x, w, d_out, sizes)
        return jax.lax.fori_loop(0, shape.repeats, after, x)

    operands = arrays(shape)
    return best_seconds(lambda: run(*operands), jax.block_until_ready, budget) / shape.repeats


def torch_seconds(shape: Shape, budget: float, device: str) -> float:
    """torch's grouped_mm, which takes the ends of groups, with the matrices in the same order. Imports torch."""
    import torch

    if shape.direction == "fp8 product":
        raise RuntimeError("grouped_mm has no scales of blocks")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    product = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]

    def made(*size: int) -> Any:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    x, w, d_out = (
        made(shape.rows, shape.n_in),
        made(shape.n_experts, shape.n_out, shape.n_in),
        made(shape.rows, shape.n_out),
    )
    ends = torch.tensor(np.cumsum(shape.sizes()), device=device, dtype=torch.int32)
    call = {
        "product": lambda: product(x, w.transpose(-2, -1), offs=ends),
        "gradient of x": lambda: product(d_out, w, offs=ends),
        "gradient of w": lambda: product(d_out.t(), x, offs=ends),
    }[shape.direction]
    return best_seconds(call, torch_wait, budget)


def peers(shape: Shape, budget: float, device: str) -> dict[str, float | str]:
    """Milliseconds of each peer, or the one-line reason why there are none."""
    calls = {
        "torch": lambda: torch_seconds(shape, budget, device),
        "ragged_dot": lambda: jax_seconds(shape, "xla", budget),
    }
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            found[name] = 1e3 * call()
        except Exception as error:  # a peer may fail in any way; the run goes on and says why
            found[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]
            print(f"  {name} skipped: {found[name]}", flush=True)
    return found


def difference(shape: Shape, implementation: str) -> float:
    """Largest difference from ragged_dot, as a share of the largest value, of as many tokens as that can hold.

    Exits if it is more than rounding.
    """
    share_held = min(1.0, DENSE_BYTES / shape.dense_bytes())
    shape = dataclasses.replace(shape, tokens=max(int(shape.tokens * share_held), 1))
    operands = arrays(shape)
    got, want = (jax.jit(of_jax(shape, name))(*operands).astype(jnp.float32) for name in (implementation, "xla"))
    share = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    if not share < TOLERANCE:
        raise SystemExit(f"{shape}: {implementation} differs from ragged_dot by {share}, allowed {TOLERANCE}")
    return share


def measure(shape: Shape, implementation: str, budget: float, device: str) -> dict[str, Any]:
    error = difference(shape, implementation)
    seconds, floor = jax_seconds(shape, implementation, budget), shape.floor_seconds()
    return {
        **dataclasses.asdict(shape),
        "largest_difference": error,
        "milliseconds": 1e3 * seconds,
        "teraflops": shape.operations() / seconds / 1e12,
        "matrix_terabytes_per_second": shape.matrix_bytes() / seconds / 1e12,
        "floor_milliseconds": None if floor is None else 1e3 * floor,
        "share_of_floor": None if floor is None else floor / seconds,
        "peers": peers(shape, budget, device),
    }


def line(row: dict[str, Any]) -> str:
    what = f"{row['tokens']:5d} {row['n_experts']:4d} {row['n_out']:6d} {row['n_in']:6d} {row['direction']:13s}"
    ratio = "     -" if row["share_of_floor"] is None else f"{row['share_of_floor']:6.2f}"
    others = "  ".join(f"{name} {t:.3f}" if isinstance(t, float) else f"{name} -" for name, t in row["peers"].items())
    rates = f"{row['milliseconds']:9.3f} {row['teraflops']:8.1f} {row['matrix_terabytes_per_second']:6.2f}"
    return f"{what} {rates} {ratio}  {others}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each measurement")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    until = time.perf_counter() + options.limit
    implementation, budget = ("xla", 0.01) if options.smoke else ("pallas_gpu", options.seconds)
    device = "cpu" if options.smoke and jax.default_backend() == "cpu" else "cuda"
    print(json.dumps(machine()), flush=True)
    print("tokens  of    out     in direction            ms  TFLOP/s   TB/s  ratio  peers (ms)", flush=True)
    rows: list[dict[str, Any]] = []
    for shape in SMOKE if options.smoke else DEFAULT:
        if time.perf_counter() > until:
            print("time is up", flush=True)
            break
        rows.append(measure(shape, implementation, budget, device))
        print(line(rows[-1]), flush=True)
        if options.out is not None:
            write(options.out, {"machine": machine(), "implementation": implementation, "rows": rows})


if __name__ == "__main__":
    main()
