"""Compiles whole models for meshes of chips that are not here: decode, prefill, a LoRA training step, a long prompt.

Weights, cache and batch are abstract: nothing is allocated, nothing is run. Each row is compiled in a process of its
own, so that the time and the memory of the compiler are its alone. Needs libtpu for TPUs, jax's CUDA plugin and the
vendor's compiler wheels for the H200 (`pip install '.[aot]'`).

    python benchmarks/aot_mesh.py                        # every row at full depth, results kept
    python benchmarks/aot_mesh.py --rows 8b-v6e --short  # two periods of layers, nothing kept
    python benchmarks/aot_mesh.py --rows large3 --short --keep  # results of these, for what takes hours at full depth

Writes benchmarks/results/aot_mesh.json: per-device bytes (with all layers of the model and their caches, however many
were compiled), FLOPs by formula, bytes that collectives move, the time these
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

from benchmarks.aot_programs import Kind, Row, layers_of, stage
from benchmarks.collective_traffic import Sent, traffic
from infer.decoding import decode_options

RAGGED = "ragged-all-to-all"
RESULTS = Path(__file__).parent / "results" / "aot_mesh.json"


class Chip(NamedTuple):
    """A device as its maker gives it: dense bfloat16 FLOP/s, bytes/s of memory, bytes/s to its peers, usable bytes."""

    flops: float
    memory_rate: float
    link_rate: float
    memory: int


# Links: of a TPU all of one chip's, in one direction; of a GPU its NVLink, in one direction.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 63 * 2**28),
    "v6e": Chip(918e12, 1640e9, 400e9, 125 * 2**28),
    "h200": Chip(989e12, 4800e9, 450e9, 141 * 10**9),
}


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
    return (*rows, *_expert_rows(), *_image_rows())


def _expert_rows() -> Iterator[Row]:
    """Mixtures of experts: Large 3 in the FP8 blocks that it is published in."""
    large, mixtral = "mistral-large-3-675b-instruct-2512", "mixtral-8x7b-v0.1"
    for name, model, chip, devices, mesh, batch in (
        ("large3-v6e", large, "v6e", 64, "expert=8,tensor=8", 32),
        ("large3-h200", large, "h200", 16, "expert=2,tensor=8", 32),
        ("8x7b-v6e", mixtral, "v6e", 8, "expert=4,tensor=2", 8),
    ):
        yield Row(f"{name}-decode", "decode", model, chip, devices, mesh, batch, 32768)
        yield Row(f"{name}-prefill", "prefill", model, chip, devices, mesh, batch, 32768)


def _image_rows() -> Iterator[Row]:
    kinds: tuple[Kind, ...] = ("tower", "prefill", "decode")
    for kind in kinds:
        name = f"14b-images-v6e-{kind}"
        yield Row(name, kind, "ministral-3-14b-base-2512", "v6e", 4, "tensor=4", 8, 32768, images=True)


ROWS = _rows()


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
    on_device = max(memory.argument_size_in_bytes, program.held) + memory.temp_size_in_bytes
    on_device += memory.output_size_in_bytes - memory.alias_size_in_bytes
    sent = traffic(compiled)
    chip = CHIPS[row.chip]
    floors = {
        "compute": program.flops / chip.flops,
        "memory": (memory.argument_size_in_bytes - program.unread) / chip.memory_rate,
        "links": _moved(sent, row.devices) / chip.link_rate,
    }
    return {
        **dataclasses.asdict(row),
        "layers": layers_of(row, short=short),
        "argument_bytes": memory.argument_size_in_bytes,
        "held_bytes": program.held,
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
    """Bytes that one device receives. An all-reduce is a reduce-scatter and an all-gather.

    A ragged exchange gives a buffer with room for the worst case, there, and what was sent back, on the way back.
    """
    ragged = [one.n_bytes for one in sent if one.name == RAGGED]
    sent = [one._replace(n_bytes=min(ragged)) if one.name == RAGGED else one for one in sent]
    per = (devices - 1) / devices
    factor = {"all-gather": per, "all-reduce": 2 * per, "reduce-scatter": devices - 1, "all-to-all": per, RAGGED: per}
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
    parser.add_argument("--keep", action="store_true", help="keep what --short finds; the row says how many layers")
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
        if options.keep or not options.short:
            found |= {} if options.short else run_alone(row, "--hashes")
            kept[row.name] = found
            part = RESULTS.with_suffix(".partial")
            part.write_text(json.dumps([kept[r.name] for r in ROWS if r.name in kept], indent=1) + "\n")
            part.replace(RESULTS)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
