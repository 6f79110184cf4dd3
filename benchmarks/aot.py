"""Compiles decode steps of whole models for chips that are not here, and keeps what the compiler says of their memory.

Weights are abstract: nothing is allocated and nothing is run. Needs libtpu for TPUs, jax's CUDA plugin and the vendor's
compiler wheels for the H200 (`pip install '.[aot]'`). One compilation at a time.

    ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/aot.py                     # every row, full depth
    ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/aot.py --rows 0 --chips v5e v6e --layers 8

Writes benchmarks/results/aot_decode.json: bytes of the arguments, of what is updated in place, of temporaries and of
the largest weight.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

from infer.decoding import DecodeState, Ends, decode, decode_options
from infer.sampling import SamplingParams, batch_arrays, batch_mode, start_history
from ministral_jax.cache import CachePlan, allocate_cache, plan_cache
from ministral_jax.catalog import find
from ministral_jax.config import ModelConfig
from ministral_jax.transformer import Transformer

RESULTS = Path(__file__).parent / "results" / "aot_decode.json"
CHIPS = ("v5e", "v6e", "tpu7x", "h200")
KEYS = ("model", "chip", "layers", "batch", "length", "page")  # of a row; another with the same replaces it
KERNEL_CALL = r'custom_call_target="[^"]*(?:tpu_custom_call|mosaic_gpu)[^"]*"'
CHUNK = 512  # tokens that a windowed layer keeps beyond its window


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: a published model, the sequences and tokens of its cache, and the chips that it has room on."""

    model: str
    batch: int
    length: int
    page: int
    chips: tuple[str, ...]


ROWS = (
    Row("ministral-8b-instruct-2410", 1, 131072, 64, ("v6e", "tpu7x", "h200")),
    Row("ministral-8b-instruct-2410", 8, 8192, 64, ("v6e", "tpu7x", "h200")),
    Row("ministral-8b-instruct-2410", 64, 4096, 16, ("tpu7x", "h200")),
    Row("ministral-3-3b-instruct-2512", 1, 32768, 64, ("v5e", "v6e", "tpu7x", "h200")),
    Row("ministral-3-14b-instruct-2512", 1, 32768, 64, ("tpu7x", "h200")),
)


class Program(NamedTuple):
    """The decode loop of one model and its arguments as shapes; `cache` is the position of the pools."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    pool_bytes: int
    largest_weight_bytes: int


def decode_program(config: ModelConfig, plan: CachePlan, batch: int, attention: Any = "auto") -> Program:
    """What a generator compiles for greedy decoding, with bfloat16 weights that are not there."""
    model = nnx.eval_shape(lambda: Transformer(config, jnp.bfloat16, attention=attention))
    graph, weights = nnx.split(model)
    cache = jax.eval_shape(lambda: allocate_cache(config, plan, jnp.dtype(jnp.bfloat16)))
    params = [SamplingParams()] * batch
    mode = batch_mode(params)
    sampling = jax.eval_shape(lambda: batch_arrays(params))
    history = jax.eval_shape(lambda: start_history([[0]] * batch, config.vocab_size, mode))
    struct: Any = jax.ShapeDtypeStruct  # stands for arrays
    of_batch, active = struct((batch,), jnp.int32), struct((batch,), jnp.bool_)
    tables = tuple(struct((batch, plan.table_width), jnp.int32) for _ in plan.groups)
    arguments = (
        weights,
        cache,
        DecodeState(of_batch, of_batch, of_batch, active, history),
        tables,
        Ends(struct((batch, 1), jnp.int32), of_batch),
        sampling,
        struct((), jnp.int32),
    )
    return Program(
        functools.partial(decode, graph, mode=mode),
        arguments,
        pool_bytes=sum(_n_bytes(pool) for pool in jax.tree.leaves(cache)),
        largest_weight_bytes=max(_n_bytes(leaf) for leaf in jax.tree.leaves(weights)),
    )


def _n_bytes(leaf: Any) -> int:
    return leaf.size * jnp.dtype(leaf.dtype).itemsize


def shortened(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The model in bfloat16, with its first layers only."""
    n_layers = layers or config.n_layers
    return dataclasses.replace(config, n_layers=n_layers, windows=config.windows[:n_layers], quantization=None)


def compile_decode(chip: str, program: Program) -> jax.stages.Compiled:
    """The decode loop for one chip, the pools and the state donated as a generator does."""
    if chip == "h200":
        from pallas_kernels.gpu.ahead_of_time import compile_for_h200

        return compile_for_h200(program.function, *program.arguments, donate=(1, 2))
    from pallas_kernels.tpu.ahead_of_time import compile_for

    return compile_for(chip, program.function, *program.arguments, donate=(1, 2), options=decode_options)  # pyright: ignore[reportArgumentType]


def measure(row: Row, chip: str, layers: int | None) -> dict[str, Any]:
    """One row of the table, as JSON values."""
    config = shortened(find(row.model).config, layers)
    plan = plan_cache(
        config, batch=row.batch, length=row.length, chunk=CHUNK, page_size=row.page, dtype=jnp.dtype(jnp.bfloat16)
    )
    program = decode_program(config, plan, row.batch)
    began = time.perf_counter()
    compiled = compile_decode(chip, program)
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    return {
        "model": row.model,
        "chip": chip,
        "layers": config.n_layers,
        "batch": row.batch,
        "length": row.length,
        "page": row.page,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "pool_bytes": program.pool_bytes,
        "largest_weight_bytes": program.largest_weight_bytes,
        "kernel_calls": len(re.findall(KERNEL_CALL, compiled.as_text() or "")),
        "jax": jax.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(ROWS)), help="of the table (default: all)")
    parser.add_argument("--layers", type=int, help="the first layers only, on every chip of --chips (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    for row in (ROWS[i] for i in options.rows):
        for chip in options.chips:
            if options.layers is None and chip not in row.chips:
                continue
            found = measure(row, chip, options.layers)
            print(json.dumps(found), flush=True)
            results = [old for old in results if any(old[key] != found[key] for key in KEYS)] + [found]
            part = options.out.with_suffix(".partial")
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(options.out)


if __name__ == "__main__":
    main()
