"""Products with quantised weights against bfloat16: decoding one token, and prefill; by the clock, or compiled only.

    python benchmarks/quantized.py [--shapes small|8b] [--tokens 1 512] [--dtype float32|bfloat16]
    python benchmarks/quantized.py --compile v6e h200

The first form measures the seven projections of a layer on the device at hand. The second compiles them for chips that
are not here (the aot extra) and reads off the compiler's memory: arguments, the floor of any product, and temporaries,
among which a dequantised matrix would be. The floor in time is bytes of weights over the device's bandwidth, or the
operations over its rate, whichever is longer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# (rows, columns) and how many of them a layer has: wq and wo, wk and wv, w1 and w3, w2.
SHAPES = {
    "small": {(1024, 1024): 2, (512, 1024): 2, (2816, 1024): 2, (1024, 2816): 1},
    "8b": {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1},
}


@dataclass(frozen=True)
class Chip:
    """What the vendor states: bytes a second, and operations a second of each kind of product."""

    bandwidth: float
    bfloat16: float
    int8: float
    fp8: float


CHIPS = {
    "h200": Chip(4.8e12, 989e12, 1979e12, 1979e12),
    "v6e": Chip(1.64e12, 918e12, 1836e12, 918e12),
}


def cases():
    """Name -> format, None for the dense matrix; those that round activations say so."""
    from ministral_jax.quantization import LinearFormat

    return {
        "dense": None,
        "int8 plain": LinearFormat("int8_channel"),
        "int8": LinearFormat("int8_channel", "dynamic"),
        "fp8 plain": LinearFormat("fp8_tensor"),
        "fp8 static": LinearFormat("fp8_tensor", "static"),
        "fp8 rows": LinearFormat("fp8_channel", "dynamic"),
        "fp8 block plain": LinearFormat("fp8_block"),
        "fp8 block": LinearFormat("fp8_block", "dynamic"),
        "nvfp4 plain": LinearFormat("nvfp4"),
        "nvfp4": LinearFormat("nvfp4", "dynamic"),
        "nf4": LinearFormat("nf4"),
    }


def product(stored):
    """A function of the arrays of a weight and of activations."""
    import jax.numpy as jnp

    def run(parts, x):
        if stored is None:
            return jnp.einsum("...I,OI->...O", x, parts["weight"])
        weight = stored.weight(parts)
        return weight.product(x) if stored.activations == "none" else weight.quantized_product(x)

    return run


def argument_shapes(stored, shape, tokens, dtype):
    """Shapes and dtypes of what `product(stored)` takes."""
    import jax

    x = jax.ShapeDtypeStruct((tokens, shape[1]), dtype)
    if stored is None:
        return {"weight": jax.ShapeDtypeStruct(shape, dtype)}, x
    return {name: jax.ShapeDtypeStruct(part.shape, part.dtype) for name, part in stored.parts(*shape).items()}, x


def weight_bytes(parts):
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in parts.values())


def floor_seconds(stored, shape, tokens, n_bytes, chip: Chip) -> float:
    kind = "bfloat16"
    if stored is not None and stored.activations != "none" and stored.format != "nvfp4":
        kind = "int8" if stored.format == "int8_channel" else "fp8"
    return max(n_bytes / chip.bandwidth, 2 * tokens * shape[0] * shape[1] / getattr(chip, kind))


def measure(arguments: argparse.Namespace) -> list[dict]:
    """Milliseconds of a layer's projections, in every format; each product is timed alone and counted as often."""
    import jax
    import jax.numpy as jnp

    from ministral_jax.quantization.encoding import encode

    chip = measured_chip(arguments.repeats) if arguments.chip is None else CHIPS[arguments.chip]
    rows = []
    for tokens in arguments.tokens:
        for name, stored in cases().items():
            seconds = floor = 0.0
            for shape, count in SHAPES[arguments.shapes].items():
                key = jax.random.key(shape[0])
                dense = jax.random.normal(key, shape, jnp.float32)
                parts = {"weight": dense.astype(arguments.dtype)} if stored is None else encode(dense, stored, 6.0)
                x = jax.random.normal(key, (tokens, shape[1]), jnp.float32).astype(arguments.dtype)
                seconds += count * best(jax.jit(product(stored)), parts, x, arguments.repeats)
                floor += count * floor_seconds(stored, shape, tokens, weight_bytes(parts), chip)
            rows.append({"tokens": tokens, "format": name, "milliseconds": 1e3 * seconds, "floor": 1e3 * floor})
    for row in rows:
        dense = next(r for r in rows if r["tokens"] == row["tokens"] and r["format"] == "dense")
        row["times_dense"] = dense["milliseconds"] / row["milliseconds"]
    return rows


def best(run, parts, x, repeats: int) -> float:
    """Fewest seconds of `repeats` runs after one that compiles."""
    run(parts, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(parts, x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measured_chip(repeats: int) -> Chip:
    """The rates of the device at hand: a matrix of 256 MB times a vector, and square products of each kind."""
    import jax
    import jax.numpy as jnp

    def multiplied(weight, x) -> float:
        into = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        return best(jax.jit(lambda w, x: jnp.matmul(w["a"], x, preferred_element_type=into)), {"a": weight}, x, repeats)

    big = jnp.ones((16384, 4096), jnp.float32)
    side = jnp.ones((1024, 1024), jnp.float32)
    operations = 2 * 1024**3
    float32, int8 = operations / multiplied(side, side), operations / multiplied(*[side.astype(jnp.int8)] * 2)
    return Chip(big.nbytes / multiplied(big, jnp.ones(4096)), float32, int8, float32)


def compiled(chip: str, tokens_of_calls: list[int]) -> list[dict]:
    """Bytes of weights and temporaries of each product, for a chip that is not here."""
    import jax.numpy as jnp

    from pallas_kernels.gpu.ahead_of_time import compile_for_h200
    from pallas_kernels.tpu.ahead_of_time import compile_for

    rows = []
    for tokens in tokens_of_calls:
        for name, stored in cases().items():
            row = {"tokens": tokens, "format": name, "weight_mb": 0.0, "temporary_mb": 0.0}
            floor = 0.0
            for shape, count in SHAPES["8b"].items():
                parts, x = argument_shapes(stored, shape, tokens, jnp.bfloat16)
                run = product(stored)
                program = compile_for_h200(run, parts, x) if chip == "h200" else compile_for(chip, run, parts, x)
                row["weight_mb"] += count * weight_bytes(parts) / 1e6
                row["temporary_mb"] = max(row["temporary_mb"], program.memory_analysis().temp_size_in_bytes / 1e6)
                floor += count * floor_seconds(stored, shape, tokens, weight_bytes(parts), CHIPS[chip])
            rows.append(row | {"floor_milliseconds": 1e3 * floor})
            print(
                f"{chip:6}{tokens:6}  {name:18}{row['weight_mb']:10.1f} MB of weights"
                f"{row['temporary_mb']:10.1f} MB temporary at most{1e3 * floor:10.4f} ms at least",
                flush=True,
            )
    return rows


def keep(name: str, record: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, target)
    print(f"written to {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of activations")
    parser.add_argument("--chip", choices=CHIPS, help="whose rates the floor is taken from (default: measured)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", nargs="+", choices=CHIPS, help="compile for these chips; measure nothing")
    arguments = parser.parse_args()
    if arguments.compile:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        for chip in arguments.compile:
            rows = compiled(chip, arguments.tokens)
            keep(f"quantized_compiled_{chip}", {"versions": {"jax": version("jax")}, "shapes": "8b", "rows": rows})
        return
    rows = measure(arguments)
    print(f"{'tokens':>6}  {'format':18}{'ms':>10}{'floor':>10}{'of floor':>10}{'x dense':>10}")
    for row in rows:
        share = row["floor"] / row["milliseconds"]
        print(f"{row['tokens']:6}  {row['format']:18}{row['milliseconds']:10.3f}{row['floor']:10.3f}"
              f"{share:10.2f}{row['times_dense']:10.2f}")  # fmt: skip
    import jax

    device = jax.devices()[0].device_kind if jax.default_backend() != "cpu" else f"{platform.machine()} CPU"
    name = (
        f"quantized_{'cpu' if jax.default_backend() == 'cpu' else device.replace(' ', '_').lower()}_{arguments.dtype}"
    )
    keep(name, {
        "device": device,
        "versions": {"jax": version("jax")},
        "shapes": {f"{rows}x{columns}": n for (rows, columns), n in SHAPES[arguments.shapes].items()},
        "chip": None if arguments.chip is None else asdict(CHIPS[arguments.chip]),
        "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
