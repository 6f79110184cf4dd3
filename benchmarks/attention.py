"""Attention on a GPU: this project's Hopper kernels against cuDNN, XLA and PyTorch, in one run, as a table and JSON.

    python benchmarks/attention.py [--shapes 4096:none 16384:4096 ...] [--out benchmarks/results/NAME.json] [--smoke]

Per shape and direction: milliseconds, TFLOP/s over the pairs that are visible, the floor (visible operations over the
chip's dense 16-bit rate, or bytes over its bandwidth, whichever is longer), their ratio, and each peer's time. Before
anything is timed, out, lse and gradients are compared with the blockwise XLA path on the device. All shapes are timed
with the kernels and cuDNN first, then with the other peers, and the file is written after each: where `--limit` ends
the run early, what is missing are peers. A peer that is not installed or refuses a shape is skipped, and the reason
kept. `--smoke` uses tiny shapes, runs on a CPU (PyTorch's peers too), and times the XLA path in the place of the
kernels: it checks this script, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks.timing import best_seconds, machine, write
from pallas_kernels import flash_attention

# NVIDIA's datasheets: dense bf16 operations and bytes per second.
CHIPS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12)}
BACKWARD_WORK = 2.5  # times the forward's operations, as everybody counts it
TOLERANCE = 0.02  # of the largest value: twice what bf16 rounding leaves


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call: tokens, window (None for all), heads and head width."""

    tokens: int
    window: int | None
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    batch: int = 1

    def pairs(self) -> int:
        """Visible query-key pairs of one head."""
        reach = min(self.window or self.tokens, self.tokens)
        return reach * (reach + 1) // 2 + (self.tokens - reach) * reach

    def operations(self) -> float:
        """Of the forward pass: two products of 2 * width operations per visible pair."""
        return 4.0 * self.width * self.pairs() * self.heads * self.batch

    def bytes(self) -> float:
        """Read and written once by the forward pass."""
        return 2.0 * self.batch * self.tokens * self.width * (2 * self.heads + 2 * self.kv_heads)

    def floor_seconds(self, direction: str) -> float | None:
        chip = next((rates for name, rates in CHIPS.items() if name in jax.devices()[0].device_kind), None)
        if chip is None:
            return None
        work, traffic = (1.0, 1.0) if direction == "forward" else (BACKWARD_WORK, 2.5)
        return max(work * self.operations() / chip[0], traffic * self.bytes() / chip[1])

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(0), 4)
        queries = (self.batch, self.tokens, self.heads, self.width)
        shared = (self.batch, self.tokens, self.kv_heads, self.width)
        shapes = queries, shared, shared, queries
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))  # pyright: ignore[reportReturnType]


DEFAULT = [
    *(Shape(tokens, None) for tokens in (4096, 8192, 16384, 32768)),
    *(Shape(tokens, 4096) for tokens in (8192, 16384, 32768, 131072)),
    *(Shape(tokens, 1024) for tokens in (4096, 8192, 16384, 32768, 131072)),
    Shape(131072, 32768),
    Shape(131072, None),
]
SMOKE = [Shape(96, None, 4, 2, 64), Shape(96, 32, 4, 2, 64)]
PASSES = [["cudnn"], ["torch_sdpa", "xla"], ["torch_flex"]]  # the slowest to compile comes last
TORCH_BLOCK = 128  # of flex_attention's block mask, both ways


@dataclasses.dataclass
class Row:
    """What was measured for one shape and direction. Milliseconds; a peer that did not run has its reason."""

    tokens: int
    window: int | None
    direction: str
    milliseconds: float
    teraflops: float
    floor_milliseconds: float | None
    share_of_floor: float | None
    peers: dict[str, float | str]


def pair_of(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]) -> dict[str, Callable[[], Any]]:
    """Compiled calls: the forward pass alone, and the backward pass alone from kept residuals."""
    q, k, v, d_out = arrays
    forward = jax.jit(attend)
    _, pull = jax.vjp(attend, q, k, v)
    backward = jax.jit(lambda pull, d_out: pull(d_out))
    return {"forward": lambda: forward(q, k, v), "backward": lambda: backward(pull, d_out)}


def jax_attention(implementation: str, window: int | None) -> Callable[..., jax.Array]:
    return lambda q, k, v: flash_attention(q, k, v, window=window, implementation=implementation)  # pyright: ignore[reportCallIssue, reportArgumentType]


def xla(shape: Shape) -> Callable[..., jax.Array]:
    if shape.tokens > 16384:
        raise RuntimeError("left out beyond 16384 tokens, where one call takes seconds")
    return jax_attention("xla", shape.window)


def cudnn(window: int | None) -> Callable[..., jax.Array]:
    local = None if window is None else (window - 1, 0)
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def torch_block_mask(shape: Shape, device: str) -> Any:
    """Which blocks flex_attention visits, and which of them it need not mask: by arithmetic, not from a dense mask."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    reach = min(shape.window or shape.tokens, shape.tokens)
    blocks = torch.arange(-(-shape.tokens // TORCH_BLOCK), device=device)
    nearest = (blocks[:, None] - blocks[None]) * TORCH_BLOCK - (TORCH_BLOCK - 1)  # smallest distance of a pair
    farthest = nearest + 2 * (TORCH_BLOCK - 1)
    bare = (nearest >= 0) & (farthest < reach)
    masked = (farthest >= 0) & (nearest < reach) & ~bare

    def listed(which: Any) -> tuple[Any, Any]:
        order = which.int().argsort(dim=-1, descending=True, stable=True)
        return which.sum(dim=-1).int()[None, None], order.int()[None, None]

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i - j < reach)

    lengths = (shape.tokens, shape.tokens)
    return BlockMask.from_kv_blocks(*listed(masked), *listed(bare), TORCH_BLOCK, seen, seq_lengths=lengths)


def torch_calls(shape: Shape, flex: bool, device: str) -> dict[str, Callable[[], Any]]:
    """scaled_dot_product_attention, or flex_attention with a block mask of the window. Imports torch."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")

    def made(heads: int) -> Any:
        size = (shape.batch, heads, shape.tokens, shape.width)
        return torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = made(shape.heads), made(shape.kv_heads), made(shape.kv_heads)
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # it gives up on a function after eight sets of shapes
        mask = torch_block_mask(shape, device)
        compiled = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
        attend = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
    elif shape.window is not None and shape.window < shape.tokens:
        raise RuntimeError("scaled_dot_product_attention has no window")
    else:
        attend = lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    out = attend()
    d_out = torch.randn_like(out)

    def backward() -> Any:
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    return {"forward": attend, "backward": backward}


def torch_wait(result: Any) -> None:
    import torch

    del result
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer_times(name: str, shape: Shape, budget: float, torch_device: str) -> dict[str, float | str]:
    """Milliseconds of a peer by direction, or the one-line reason why there are none."""
    wait = torch_wait if name.startswith("torch") else jax.block_until_ready
    try:
        if name.startswith("torch"):
            calls = torch_calls(shape, name == "torch_flex", torch_device)
        else:
            calls = pair_of(cudnn(shape.window) if name == "cudnn" else xla(shape), shape.arrays())
        return {way: 1e3 * best_seconds(call, wait, budget) for way, call in calls.items()}
    except Exception as error:  # a peer may fail in any way; the run goes on and says why
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
        print(f"  {name} skipped for {shape.tokens}:{shape.window or 'none'}: {reason}", flush=True)
        return {"forward": reason, "backward": reason}


def checked_shapes(shapes: list[Shape]) -> list[Shape]:
    """Shorter ones that stand for these: the tiles are the same, and long shapes would spend the time on the check."""
    short = set()
    for shape in shapes:
        tokens = min(shape.tokens, 2 * shape.window if shape.window else 4096, 8192)
        window = None if shape.window is None or shape.window >= tokens else shape.window
        short.add(dataclasses.replace(shape, tokens=tokens if window else min(tokens, 4096), window=window))
    return sorted(short, key=str)


def check(shape: Shape, implementation: str) -> dict[str, float]:
    """Largest differences from the XLA path on this device, as shares of the largest value. Raises if too large."""
    q, k, v, d_out = shape.arrays()

    def results(name: str) -> Any:
        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            return flash_attention(q, k, v, window=shape.window, implementation=name, return_lse=True)  # pyright: ignore[reportCallIssue, reportArgumentType]

        (out, lse), pull = jax.vjp(jax.jit(both), q, k, v)
        return out, lse, *pull((d_out, jnp.zeros_like(lse)))

    errors = {}
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results(implementation), results("xla"), strict=True):
        difference = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
        errors[name] = float(difference / jnp.abs(want.astype(jnp.float32)).max())
    if not all(error < TOLERANCE for error in errors.values()):
        raise SystemExit(f"{shape}: {implementation} differs from xla by {errors}, allowed {TOLERANCE}")
    return errors


def measure(shape: Shape, implementation: str, budget: float) -> list[Row]:
    rows = []
    for direction, call in pair_of(jax_attention(implementation, shape.window), shape.arrays()).items():
        seconds = best_seconds(call, jax.block_until_ready, budget)
        work = shape.operations() * (1 if direction == "forward" else BACKWARD_WORK)
        floor = shape.floor_seconds(direction)
        rows.append(
            Row(
                shape.tokens,
                shape.window,
                direction,
                1e3 * seconds,
                work / seconds / 1e12,
                None if floor is None else 1e3 * floor,
                None if floor is None else floor / seconds,
                {},
            )
        )
    return rows


def line(row: Row) -> str:
    floor = (
        "     -      -"
        if row.floor_milliseconds is None
        else f"{row.floor_milliseconds:8.3f} {row.share_of_floor:6.2f}"
    )
    peers = "  ".join(f"{name} {t:.3f}" if isinstance(t, float) else f"{name} -" for name, t in row.peers.items())
    what = f"{row.tokens:7d} {row.window or 'none'!s:>6} {row.direction:8s}"
    return f"{what} {row.milliseconds:9.3f} {row.teraflops:8.1f} {floor}  {peers}"


def parsed(text: str) -> Shape:
    tokens, _, window = text.partition(":")
    try:
        return Shape(int(tokens), None if window in ("", "none") else int(window))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected TOKENS:WINDOW, such as 16384:4096 or 4096:none") from None


def run(
    shapes: list[Shape], implementation: str, budget: float, passes: list[list[str]], torch_device: str, until: float
) -> Iterator[list[Row]]:
    """All rows so far, after each shape of each pass; the first pass times the kernels too. Ends when it is `until`."""
    rows: dict[Shape, list[Row]] = {}
    for number, peers in enumerate(passes or [[]]):
        for shape in shapes:
            if time.perf_counter() > until:
                print("time is up", flush=True)
                return
            if number == 0:
                rows[shape] = measure(shape, implementation, budget)
            for name in peers:
                found = peer_times(name, shape, budget, torch_device)
                for row in rows[shape]:
                    row.peers[name] = found[row.direction]
            for row in rows[shape]:
                print(line(row), flush=True)
            yield [row for of_shape in rows.values() for row in of_shape]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parsed, default=None, metavar="TOKENS:WINDOW")
    parser.add_argument("--implementation", default="pallas_gpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each measurement")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    until = time.perf_counter() + arguments.limit
    shapes = arguments.shapes or (SMOKE if arguments.smoke else DEFAULT)
    implementation = "xla" if arguments.smoke else arguments.implementation
    seconds = 0.01 if arguments.smoke else arguments.seconds
    print(json.dumps(machine()), flush=True)
    errors = {f"{s.tokens}:{s.window or 'none'}": check(s, implementation) for s in checked_shapes(shapes)}
    print(f"equal to xla within {TOLERANCE}: {', '.join(errors)}", flush=True)
    if arguments.check_only:
        return
    print(" tokens window direction        ms  TFLOP/s    floor  ratio  peers (ms)", flush=True)
    passes = [] if arguments.no_peers else PASSES
    torch_device = "cpu" if arguments.smoke and jax.default_backend() == "cpu" else "cuda"
    for rows in run(shapes, implementation, seconds, passes, torch_device, until):
        record = {"machine": machine(), "implementation": implementation, "errors": errors}
        if arguments.out is not None:
            write(arguments.out, record | {"rows": [dataclasses.asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
