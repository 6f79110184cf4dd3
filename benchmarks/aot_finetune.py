"""Compiles LoRA steps for one chip that is not here, and keeps what the compiler says of their memory.

    python benchmarks/aot_finetune.py                       # every row, results kept
    python benchmarks/aot_finetune.py --rows 8b-h200-nf4    # the rows of these names, which replace those that are kept

Weights and batch are abstract: nothing is allocated, nothing is run. Each row is compiled in a process of its own.
Needs libtpu for TPUs, jax's CUDA plugin and the vendor's compiler wheels for the H200 (`pip install '.[aot]'`). Writes
benchmarks/results/aot_finetune.json: bytes of the arguments, by what they are, and of temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from benchmarks.finetune import Case, stacked_model, train_step
from benchmarks.timing import RESULTS, write

OUT = RESULTS / "aot_finetune.json"
SHORT, LONG = 2048, 8192


@dataclasses.dataclass(frozen=True)
class Row:
    """A step on one chip."""

    name: str
    chip: str
    case: Case


def _rows() -> tuple[Row, ...]:
    def row(model: str, chip: str, base: Any, tokens: int, remat: Any = "full") -> Row:
        name = f"{model}-{chip}-{base}-{tokens // 1024}k-{remat}"
        return Row(name, chip, Case(name, model, base, tokens, remat))

    short = [
        row(model, chip, base, SHORT)
        for chip in ("h200", "v6e")
        for model in ("8b", "3b")
        for base in ("bfloat16", "nf4")
    ]
    long = [row(model, "h200", "bfloat16", LONG, remat) for model in ("8b", "3b") for remat in ("full", "dots", "none")]
    return (*short, *long, row("8b", "h200", "nf4", LONG))


ROWS = _rows()


def compiled(row: Row) -> tuple[jax.stages.Compiled, int]:
    """The step for the row's chip, and the bytes of what is trained and its moments."""
    if row.chip == "h200":
        from pallas_kernels.gpu.ahead_of_time import absent_gpu, put_compiler_on_path

        put_compiler_on_path()
        there: Any = absent_gpu()
    else:
        from pallas_kernels.tpu.ahead_of_time import absent_chip

        there = absent_chip(row.chip)  # pyright: ignore[reportArgumentType]
    step = train_step(stacked_model(row.case))
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there.sharding),
        step.shapes(1, 1, row.case.tokens),
    )
    trained = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((placed[0].trained, placed[0].moments)))
    with jax.sharding.use_abstract_mesh(there.mesh):
        return step.lower(*placed).compile(), trained


def measure(row: Row) -> dict[str, Any]:
    """One row as JSON values."""
    began = time.perf_counter()
    program, trained = compiled(row)
    memory: Any = program.memory_analysis()
    fresh = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {
        "name": row.name,
        "chip": row.chip,
        **{key: value for key, value in dataclasses.asdict(row.case).items() if key not in ("name", "steps")},
        "frozen_bytes": memory.argument_size_in_bytes - trained,
        "trained_bytes": trained,
        "temporary_bytes": memory.temp_size_in_bytes + fresh,
        "device_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh,
        "seconds": round(time.perf_counter() - began, 1),
        "jax": jax.__version__,
    }


def run_alone(row: Row) -> dict[str, Any]:
    """`measure` in a process of its own; what went wrong there becomes the row's "error"."""
    ended = subprocess.run([sys.executable, __file__, "--one", row.name], capture_output=True, text=True, check=False)
    if ended.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*$", ended.stderr, re.MULTILINE)
        return {"name": row.name, "error": (errors or ended.stderr.splitlines() or ["no word"])[-1][:400]}
    return json.loads(ended.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], help="beginnings of names of rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(next(row for row in ROWS if row.name == options.one))))
        return
    kept = {row["name"]: row for row in json.loads(OUT.read_text())} if OUT.exists() else {}
    for row in (row for row in ROWS if row.name.startswith(tuple(options.rows))):
        kept[row.name] = run_alone(row)
        write(OUT, [kept[row.name] for row in ROWS if row.name in kept])
        print(json.dumps(kept[row.name]), flush=True)


if __name__ == "__main__":
    main()
