"""Compiles whole models for meshes of chips that are not here: decode, prefill, a LoRA training step, a long prompt.

Weights, cache and batch are abstract: nothing is allocated, nothing is run. Each row is compiled in a process of its
own, so that the time and the memory of the compiler are its alone. Needs libtpu for TPUs, jax's CUDA plugin and the
vendor's compiler wheels for the H200 (`pip install '.[aot]'`).

    python benchmarks/aot_mesh.py                        # every row at full depth, results kept
    python benchmarks/aot_mesh.py --rows 8b-v6e --short  # two periods of layers, nothing kept

Writes benchmarks/results/aot_mesh.json: per-device bytes, FLOPs by formula, bytes that collectives move, the time these
take at the chips' rates (a floor, not a measurement), what compiling took, and a hash of the program before XLA had it,
at two periods of layers: when that of a later version differs, the row is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.collective_traffic import Sent, traffic
from infer.decoding import DecodeState, Ends, decode, decode_options, prefill
from infer.sampling import SamplingParams, batch_arrays, batch_mode, start_history
from ministral_jax.cache import PagedBatch, PagedCache, allocate_cache, plan_cache, pool_axes
from ministral_jax.catalog import find
from ministral_jax.config import ModelConfig
from ministral_jax.lora import LoraConfig, attach
from ministral_jax.memory import count_parameters
from ministral_jax.parameters import fill
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.stacked import StackedTransformer, pattern
from ministral_jax.transformer import Transformer

RESULTS = Path(__file__).parent / "results" / "aot_mesh.json"
BFLOAT16 = jnp.dtype(jnp.bfloat16)
PAGE, CHUNK = 64, 512
Struct: Any = jax.ShapeDtypeStruct  # stands for arrays


class Chip(NamedTuple):
    """A device as its maker gives it: dense bfloat16 FLOP/s, bytes/s of memory, bytes/s to its peers, bytes."""

    flops: float
    memory_rate: float
    link_rate: float
    memory: int


# Links: of a TPU all of one chip's, in one direction; of a GPU its NVLink, in one direction.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 16 * 2**30),
    "v6e": Chip(918e12, 1640e9, 400e9, 32 * 2**30),
    "h200": Chip(989e12, 4800e9, 450e9, 141 * 10**9),
}
TOPOLOGIES = {4: "2x2", 8: "2x4"}
Kind = Literal["decode", "prefill", "train", "long"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: `batch` sequences of up to `length` tokens; for "train" and "long" exactly so many."""

    name: str
    kind: Kind
    model: str
    chip: str
    devices: int
    mesh: str
    batch: int
    length: int


def _rows() -> tuple[Row, ...]:
    models = {"3b": "ministral-3-3b-base-2512", "8b": "ministral-8b-instruct-2410", "14b": "ministral-3-14b-base-2512"}
    places = [("3b", "v5e", 4), ("8b", "v5e", 8), ("8b", "v6e", 8), ("14b", "v6e", 8)]
    places += [(model, "h200", 8) for model in models]
    rows = []
    for model, chip, devices in places:
        of = functools.partial(Row, model=models[model], chip=chip, devices=devices)
        name = f"{model}-{chip}"
        rows += [
            of(name=f"{name}-decode", kind="decode", mesh=f"tensor={devices}", batch=8, length=32768),
            of(name=f"{name}-prefill", kind="prefill", mesh=f"tensor={devices}", batch=8, length=32768),
        ]
        if chip != "v5e":
            rows.append(of(name=f"{name}-train", kind="train", mesh=f"fsdp={devices}", batch=devices, length=8192))
    for chip in ("v6e", "h200"):
        rows.append(Row(f"8b-{chip}-long", "long", models["8b"], chip, 8, "context=8", 1, 262144))
    return tuple(rows)


ROWS = _rows()


class Program(NamedTuple):
    """A staged program, not compiled yet, and the FLOPs of one device."""

    lowered: jax.stages.Lowered
    flops: float


def devices_of(row: Row) -> Sequence[Any]:
    """The chips of a row, from their makers' descriptions."""
    if row.chip == "h200":
        from pallas_kernels.gpu.ahead_of_time import absent_gpus

        return absent_gpus(row.devices)
    from pallas_kernels.tpu.ahead_of_time import absent_slice

    return absent_slice(f"{row.chip}:{TOPOLOGIES[row.devices]}")


def config_of(row: Row, *, short: bool) -> ModelConfig:
    """The text model in bfloat16, whole or its first two periods; a long prompt gets the context it needs."""
    config = find(row.model).config
    layers = 2 * pattern(config).period if short else config.n_layers
    return dataclasses.replace(
        config, n_layers=layers, windows=config.windows[:layers], quantization=None, vision=None,
        max_length=max(config.max_length, row.length),
    )  # fmt: skip


def stage(row: Row, *, short: bool = False) -> Program:
    """The program of a row, traced for its mesh."""
    config = config_of(row, short=short)
    layout = layout_for(config, make_mesh(row.mesh, devices_of(row)))
    lowered, flops = {"decode": _decode, "prefill": _prefill, "train": _train, "long": _long}[row.kind](
        row, config, layout
    )
    return Program(lowered, flops / row.devices)


def _model(config: ModelConfig, layout: Layout) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, BFLOAT16, layout=layout))


def _placed(model: nnx.Module, layout: Layout) -> Any:
    """The model with shapes in the place of arrays, each where the layout puts it."""
    return fill(model, lambda name, spec: Struct(spec.shape, spec.dtype, sharding=layout.placement(name, spec)))


def _rows_of(layout: Layout, tree: Any, *axes: str) -> Any:
    sharding = layout.sharding(("rows", *axes))
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=sharding), tree)


def _cache(row: Row, config: ModelConfig, layout: Layout) -> tuple[PagedCache, tuple[Any, ...]]:
    """The pools and the page tables of the row's sequences."""
    plan = plan_cache(
        config, batch=row.batch // layout.ways("rows"), length=row.length, chunk=CHUNK, page_size=PAGE,
        dtype=BFLOAT16, layout=layout,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: allocate_cache(config, plan, BFLOAT16, layout))

    def placed(pools: tuple[Any, ...]) -> tuple[Any, ...]:
        shardings = [layout.sharding(pool_axes(config, window)) for window in config.windows]
        return tuple(
            None if x is None else Struct(x.shape, x.dtype, sharding=s) for x, s in zip(pools, shardings, strict=True)
        )

    cache = PagedCache(placed(cache.keys), placed(cache.values), cache.group_of_layer)
    tables = tuple(_rows_of(layout, Struct((row.batch, plan.table_width), jnp.int32)) for _ in plan.groups)
    return cache, tables


def _decode(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    graph, weights = nnx.split(_placed(_model(config, layout), layout))
    cache, tables = _cache(row, config, layout)
    params = [SamplingParams()] * row.batch
    mode = batch_mode(params)
    history = jax.eval_shape(lambda: start_history([[0]] * row.batch, config.vocab_size, mode))
    of_batch, active = Struct((row.batch,), jnp.int32), Struct((row.batch,), jnp.bool_)
    rest = (
        DecodeState(of_batch, of_batch, of_batch, active, history),
        tables,
        Ends(Struct((row.batch, 1), jnp.int32), of_batch),
        jax.eval_shape(lambda: batch_arrays(params)),
    )
    arguments = (weights, cache, *_rows_of(layout, rest), Struct((), jnp.int32))
    step = jax.jit(functools.partial(decode, graph, mode=mode), donate_argnums=(1, 2))
    return step.lower(*arguments), row.batch * _token_flops(config, row.length)


def _prefill(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """A chunk of one sequence's prompt that ends at the last token it has room for."""
    graph, weights = nnx.split(_placed(_model(config, layout), layout))
    cache, tables = _cache(row, config, layout)
    shards = layout.ways("rows")
    ints = functools.partial(Struct, dtype=jnp.int32)
    hidden, tokens, starts, of_batch = _rows_of(
        layout, (Struct((row.batch, config.dim), BFLOAT16), ints((shards * CHUNK,)), ints((row.batch + shards,)),
                 ints((row.batch,))),
    )  # fmt: skip
    step = jax.jit(functools.partial(prefill, graph), donate_argnums=(1, 2))
    lowered = step.lower(weights, cache, hidden, tokens, PagedBatch(tables, starts, of_batch), of_batch)
    return lowered, shards * CHUNK * _token_flops(config, row.length)


def _long(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """Hidden states of whole sequences, split over the context axis."""
    graph, weights = nnx.split(_placed(_model(config, layout), layout))
    axes = ("batch", "sequence")
    tokens = Struct((row.batch, row.length), jnp.int32, sharding=layout.sharding(axes))
    out = layout.sharding((*axes, "act_embed"))
    step = jax.jit(lambda weights, tokens: nnx.merge(graph, weights).hidden(tokens), out_shardings=out)
    return step.lower(weights, tokens), row.batch * row.length * _mean_flops(config, row.length)


def _train(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """LoRA of rank 16 on all projections over a frozen base, one packed row per device, inputs of blocks kept."""
    from train.optimizer import Optimizer, OptimizerConfig
    from train.step import TrainStep, trained_specs

    model = Transformer(config, BFLOAT16, layout=layout)
    attach(model, LoraConfig(rank=16, alpha=32))
    stacked = StackedTransformer(model)
    step = TrainStep(stacked, Optimizer(OptimizerConfig(learning_rate=1e-4, steps=100), trained_specs(stacked)))
    state, batch = step.shapes(1, row.batch, row.length)
    # Forward, again forward for what was not kept, and the gradient of activations: of weights there is none.
    return step.lower(state, batch), 3 * row.batch * row.length * _mean_flops(config, row.length)


def _token_flops(config: ModelConfig, length: int) -> float:
    """Of one token at the end of `length`: 2 per weight that it passes and 4 H N per key that it sees."""
    seen = sum(length if window is None else min(window, length) for window in config.windows)
    return 2.0 * _weights(config) + 4.0 * config.head_dim * config.n_heads * seen


def _mean_flops(config: ModelConfig, length: int) -> float:
    """Of a token of a whole sequence, on average."""

    def seen(window: int | None) -> float:
        w = length if window is None else min(window, length)
        return w - w * (w - 1) / (2 * length)

    return 2.0 * _weights(config) + 4.0 * config.head_dim * config.n_heads * sum(map(seen, config.windows))


def _weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: not the embeddings, of which it is a row."""
    return count_parameters(config).active - config.vocab_size * config.dim


def program_hash(lowered: jax.stages.Lowered) -> str:
    """Of the program without source locations and without the kernels' own code, which carries paths."""
    text = re.sub(r"backend_config = \"[^\"]*\"", "", lowered.as_text(debug_info=False))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(row: Row, *, short: bool) -> dict[str, Any]:
    """One row of the table, as JSON values; in a process that has done nothing else."""
    began = time.perf_counter()
    program = stage(row, short=short)
    staged = time.perf_counter()
    options = decode_options() if row.kind == "decode" else None
    compiled = program.lowered.compile(compiler_options=options)
    ended = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    on_device = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    on_device += memory.temp_size_in_bytes
    sent = traffic(compiled)
    chip = CHIPS[row.chip]
    floors = {
        "compute": program.flops / chip.flops,
        "memory": memory.argument_size_in_bytes / chip.memory_rate,
        "links": _moved(sent, row.devices) / chip.link_rate,
    }
    return {
        **dataclasses.asdict(row),
        "layers": config_of(row, short=short).n_layers,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "device_bytes": on_device,
        "fits": on_device <= chip.memory,
        "collectives": _by_name(sent),
        "moved_bytes": _moved(sent, row.devices),
        "flops": program.flops,
        "floor_seconds": {name: float(f"{seconds:.3g}") for name, seconds in floors.items()},
        "trace_seconds": round(staged - began, 1),
        "compile_seconds": round(ended - staged, 1),
        "compiler_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "jax": jax.__version__,
        **({"hash": program_hash(program.lowered)} if short else {}),
    }


def _moved(sent: Sequence[Sent], devices: int) -> int:
    """Bytes that one device receives. An all-reduce is a reduce-scatter and an all-gather."""
    per = (devices - 1) / devices
    factor = {"all-gather": per, "all-reduce": 2 * per, "reduce-scatter": devices - 1, "all-to-all": per}
    return int(sum(one.n_bytes * one.times * factor.get(one.name, 1.0) for one in sent))


def _by_name(sent: Sequence[Sent]) -> dict[str, int]:
    """How often each kind of collective runs."""
    return {name: sum(one.times for one in sent if one.name == name) for name in sorted({one.name for one in sent})}


def run_alone(row: Row, *options: str) -> dict[str, Any]:
    """`measure` in a process of its own; what went wrong there becomes the row's "error"."""
    command = [sys.executable, __file__, "--one", row.name, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*$", ended.stderr, re.MULTILINE)
        return {**dataclasses.asdict(row), "error": (errors or ended.stderr.splitlines() or ["no word"])[-1][:400]}
    return json.loads(ended.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument("--rows", nargs="+", default=[""], help=f"beginnings of names, of {names}")
    parser.add_argument("--short", action="store_true", help="two periods of layers; prints, keeps nothing")
    parser.add_argument("--hashes", action="store_true", help="only trace, and say which rows are out of date")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        row = next(row for row in ROWS if row.name == options.one)
        found = {"hash": program_hash(stage(row, short=True).lowered)} if options.hashes else {}
        print(json.dumps(found or measure(row, short=options.short)))
        return
    kept = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for row in (row for row in ROWS if row.name.startswith(tuple(options.rows))):
        if options.hashes:
            known = kept.get(row.name, {}).get("hash")
            now = run_alone(row, "--hashes").get("hash")
            print(f"{row.name}: {'as recorded' if now == known else f'out of date: {known} was recorded, {now} is'}")
            continue
        found = run_alone(row, *(["--short"] if options.short else []))
        if not options.short:
            found |= run_alone(row, "--hashes")
            kept[row.name] = found
            part = RESULTS.with_suffix(".partial")
            part.write_text(json.dumps([kept[r.name] for r in ROWS if r.name in kept], indent=1) + "\n")
            part.replace(RESULTS)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
