"""A LoRA step: tokens per second, share of its floor, memory; and transformers with PEFT on the same work, in the run.

    python benchmarks/finetune.py [--cases 8b-8k-bfloat16 ...] [--limit 500] [--out FILE] [--smoke]

Both sides have the same shapes, the same weights to the bit, the same packed batch, rank and modules, AdamW and
clipping, and both or neither compute a layer's inside again in the backward pass. Each runs in a process of its own,
one after the other. The floor is the useful operations of a step (train.metrics.step_flops: 4 P a token, and attention)
over the rate of one large product here. On a GPU the cases are Ministral 3's shapes, and `share_of_peak` is MFU by the
data sheet; on a CPU a small model in float32, where processors' seconds count, which other work delays less. Needs
neither mistral-common nor grain; transformers and PEFT for their rows, which otherwise say why they are not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share the device, and torch does

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import RESULTS, best_seconds, machine, write
from ministral_jax.catalog import find
from ministral_jax.config import ModelConfig, RopeConfig
from ministral_jax.linear import projections
from ministral_jax.lora import LoraConfig, attach
from ministral_jax.parameters import ParameterSpec, fill
from ministral_jax.quantization import LinearFormat
from ministral_jax.stacked import Remat, StackedTransformer
from ministral_jax.transformer import Transformer
from train.data.batches import Batch
from train.metrics import peak_flops, peak_memory, step_flops
from train.optimizer import Optimizer, OptimizerConfig
from train.step import TrainStep, trained_specs

Base = Literal["float32", "bfloat16", "nf4", "int8"]


class Small(NamedTuple):
    """Sizes of a model for a CPU, where everything is float32."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int


STORED = {"nf4": LinearFormat("nf4", double=True), "int8": LinearFormat("int8_channel")}
MODELS = {"8b": "ministral-3-8b-base-2512", "3b": "ministral-3-3b-base-2512"}
SMALL = {
    "small": Small(512, 8, 8, 2, 64, 1792, 16384),
    "smoke": Small(32, 2, 4, 2, 8, 48, 96),
}
DOCUMENTS = (0.11, 0.37, 0.52)  # where a row's documents end, as shares of it; the last one ends with the row
STD = 0.02
RATE, CLIP, ALPHA_PER_RANK = 1e-4, 1.0, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a model's shape with one packed row of so many tokens; steps after one that warms up."""

    name: str
    model: str
    base: Base
    tokens: int
    remat: Remat = "full"
    steps: int = 5
    rank: int = 16

    @property
    def has_peer(self) -> bool:
        """transformers' quantised weights are another library's, and its choice is all of a layer again or nothing."""
        return self.base not in STORED and self.remat != "dots"


# What says most comes first: the rest may not be reached in the time that a device is there.
ON_GPU = (
    Case("8b-8k-bfloat16-none", "8b", "bfloat16", 8192, "none"),
    Case("8b-8k-bfloat16-full", "8b", "bfloat16", 8192),
    Case("8b-8k-nf4-full", "8b", "nf4", 8192),
    Case("8b-2k-bfloat16-full", "8b", "bfloat16", 2048),
    Case("8b-2k-nf4-full", "8b", "nf4", 2048),
    Case("3b-8k-bfloat16-none", "3b", "bfloat16", 8192, "none"),
    Case("3b-8k-bfloat16-full", "3b", "bfloat16", 8192),
    Case("8b-8k-bfloat16-dots", "8b", "bfloat16", 8192, "dots"),
    Case("3b-8k-nf4-full", "3b", "nf4", 8192),
)
ON_CPU = (
    Case("small-full", "small", "float32", 2048, steps=3),
    Case("small-none", "small", "float32", 2048, "none", steps=3),
    Case("small-int8-full", "small", "int8", 2048, steps=3),
    Case("small-nf4-full", "small", "nf4", 2048, steps=3),
)
SMOKE = (Case("smoke-full", "smoke", "float32", 64, steps=2), Case("smoke-nf4", "smoke", "nf4", 64, steps=2))
CASES = {case.name: case for case in (*ON_GPU, *ON_CPU, *SMOKE)}


class Measured(NamedTuple):
    """Of one side: fewest seconds of a step, on the clock and of processors, its loss after each, bytes at most."""

    seconds: float
    cpu_seconds: float
    losses: list[float]
    peak_bytes: int | None
    program_bytes: int | None = None
    note: str = ""


def config_of(case: Case) -> ModelConfig:
    """A published shape, or one for a CPU; with plain rotary positions, which the peer's class has too."""
    config = dataclasses.replace(
        find(MODELS.get(case.model, MODELS["8b"])).config, quantization=None, vision=None, temperature=None,
        rope=RopeConfig(theta=1e6),
    )  # fmt: skip
    sizes = SMALL.get(case.model)
    if sizes is None:
        return config
    return dataclasses.replace(config, **sizes._asdict(), windows=(None,) * sizes.n_layers, tied_embeddings=False)


def stacked_model(case: Case) -> StackedTransformer:
    """The model with adapters on all seven projections, without weights."""
    model = Transformer(config_of(case), jnp.float32 if case.model in SMALL else jnp.bfloat16)
    if case.base in STORED:
        for projection in projections(model).values():
            projection.store_as(STORED[case.base])
    attach(model, LoraConfig(rank=case.rank, alpha=ALPHA_PER_RANK * case.rank))
    return StackedTransformer(model, remat=case.remat)


def train_step(model: StackedTransformer) -> TrainStep:
    """The step that is measured: AdamW at a constant rate, gradients clipped."""
    settings = OptimizerConfig(learning_rate=RATE, steps=1000, schedule="constant", clip_norm=CLIP)
    return TrainStep(model, Optimizer(settings, trained_specs(model)))


def weight_key(name: str) -> int:
    """Where a matrix's pseudo-random numbers begin, by its name in the mistral layout."""
    return zlib.crc32(name.encode())


def drawn(model: StackedTransformer, name: str, spec: ParameterSpec) -> jax.Array:
    """One parameter: what finetune_peer.py makes of the same names, by arithmetic on whole numbers."""
    if spec.init in ("ones", "zeros"):
        return jnp.full(spec.shape, float(spec.init == "ones"), spec.dtype)
    if spec.init == "stored":
        return _stored(name, spec)
    names = model.pattern.names(name)
    keys = jnp.asarray([weight_key(one) for one in names], jnp.uint32)
    found = _hashed(keys, spec.shape[-2:], jnp.dtype(spec.dtype))
    return found if name.startswith("places.") else found[0]


def _stored(name: str, spec: ParameterSpec) -> jax.Array:
    """A part of a quantised matrix whose numbers deviate by about STD."""
    key = jax.random.key(weight_key(name))
    if spec.dtype == jnp.uint8:
        return jax.random.bits(key, spec.shape, jnp.uint8)
    if spec.dtype == jnp.int8:
        return jax.random.randint(key, spec.shape, 1 if name.endswith("absmax") else -127, 128, jnp.int8)
    scale = 0.0 if name.endswith("offset") else STD / 73  # 73 is what such integers deviate by
    return jnp.full(spec.shape, scale, spec.dtype)


def _hash_of(keys: jax.Array, rows: int, columns: int) -> jax.Array:
    """Uniform within +- sqrt(3) STD of each index, mixed as in MurmurHash3's last lines; [keys, rows, columns]."""
    index = jax.lax.iota(jnp.uint32, rows * columns).reshape(rows, columns)
    h = index[None] * jnp.uint32(2654435761) + keys[:, None, None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    share = (h >> 8).astype(jnp.float32) * 2.0**-24  # [0, 1)
    return (share - 0.5) * (2 * 3**0.5 * STD)


def _hashed(keys: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.jit(lambda keys: _hash_of(keys, *shape).astype(dtype))(keys)


def batch_of(case: Case, vocab: int) -> Batch:
    """One packed row [1, 1, T] of four documents; all is trained but what would cross from one into the next."""
    T = case.tokens
    ends = [*(int(share * T) for share in DOCUMENTS), T]
    starts = [0, *ends[:-1]]
    tokens = (7919 * np.arange(T + 1, dtype=np.int64) % vocab).astype(np.int32)
    lengths = np.diff([0, *ends])
    segments = np.repeat(np.arange(1, len(ends) + 1), lengths)
    positions = np.arange(T) - np.repeat(starts, lengths)
    weights = np.ones(T)
    weights[[end - 1 for end in ends]] = 0
    kinds = (np.int32, np.int32, np.float32, np.int32, np.int32)
    arrays = (tokens[:-1], tokens[1:], weights, positions, segments)
    return Batch(*(array.astype(kind)[None, None] for array, kind in zip(arrays, kinds, strict=True)))


def timed(step: Callable[[], float], steps: int, warmed: Callable[[], object]) -> tuple[float, float, list[float]]:
    """Fewest seconds and processors' seconds of a step that waits for its end, after one that is not timed."""
    losses = [step()]
    warmed()
    best, best_cpu = float("inf"), float("inf")
    for _ in range(steps):
        began, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        best, best_cpu = min(best, time.perf_counter() - began), min(best_cpu, time.process_time() - cpu)
    return best, best_cpu, losses


def host_peak(*, reset: bool = False) -> int:
    """Most bytes that this process has held in memory, since the last reset where the system can do that."""
    if reset and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * (found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def ours(case: Case) -> Measured:
    """This project's training step."""
    before = host_peak()
    model = stacked_model(case)
    train = train_step(model)
    memory: Any = train.compile(1, 1, case.tokens).memory_analysis()
    state = train.initial_state(fill(model, lambda name, spec: drawn(model, name, spec)), jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch_of(case, model.config.vocab_size))

    def step() -> float:
        nonlocal state
        state, metrics = train(state, batch)
        return float(jax.block_until_ready((metrics.loss, state.trained))[0])

    seconds, cpu, losses = timed(step, case.steps, lambda: host_peak(reset=True))
    on_host = host_peak() - before if jax.default_backend() == "cpu" else None
    program = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Measured(seconds, cpu, losses, peak_memory() or on_host, program)


def theirs(case: Case) -> Measured:
    """transformers with PEFT and torch's AdamW."""
    return importlib.import_module("benchmarks.finetune_peer").measure(case)


def product_rate(case: Case) -> dict[str, float]:
    """Operations per second, and per second of processors, of one large product in the dtype of the case."""
    cpu = jax.default_backend() == "cpu"
    n, dtype = (8192, jnp.bfloat16) if not cpu else (2048, jnp.float32)
    one = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda one: one @ one.T)
    best_cpu = float("inf")
    for _ in range(5):
        began = time.process_time()
        product(one).block_until_ready()
        best_cpu = min(best_cpu, time.process_time() - began)
    best = best_seconds(lambda: product(one), jax.block_until_ready, 1.0)
    return {"wall": 2 * n**3 / best, "cpu": 2 * n**3 / best_cpu}


SIDES: dict[str, Callable[[Case], Any]] = {"ours": ours, "theirs": theirs, "rate": product_rate}


def apart(side: str, case: Case, seconds: float) -> dict[str, Any] | str:
    """One side in a process of its own, or in a few words why there is nothing."""
    command = [sys.executable, __file__, "--side", side, "--case", case.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no result within {seconds:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
    return json.loads(done.stdout.splitlines()[-1])


def better(one: dict[str, Any] | str, other: dict[str, Any] | str) -> dict[str, Any] | str:
    """Two rounds of a side as one: the least of each time, the highest of each rate; one that failed does not count."""
    if isinstance(one, str) or isinstance(other, str):
        return other if isinstance(one, str) else one
    choose = {"seconds": min, "cpu_seconds": min, "wall": max, "cpu": max}
    return one | {name: choose[name](one[name], other[name]) for name in one if name in choose}


def measure(case: Case, rounds: int, until: float) -> dict[str, Any]:
    """A row: both sides in turns, the rate of products, and what follows from them."""
    sides = ("rate", "ours", *(["theirs"] if case.has_peer else []))
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for side in sides:
            new = apart(side, case, max(1.0, until - time.perf_counter()))
            found[side] = better(found[side], new) if side in found else new
    return dataclasses.asdict(case) | derived(case, found)


def derived(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """What the seconds of both sides mean."""
    mine, peer, rate = (found.get(side) for side in ("ours", "theirs", "rate"))
    if not isinstance(mine, dict) or not isinstance(rate, dict):
        return {"left_out": mine if isinstance(mine, str) else rate}
    config = config_of(case)
    flops = step_flops(config, batch_of(case, config.vocab_size), full=False)
    peak = peak_flops(jax.devices()[0].device_kind, 1)
    clock, of = ("cpu_seconds", "cpu") if jax.default_backend() == "cpu" else ("seconds", "wall")
    row = {
        "operations": flops,
        "operations_per_second": rate,
        "tokens_per_second": case.tokens / mine["seconds"],
        "floor_seconds": flops / rate[of],
        "share_of_floor": flops / rate[of] / mine[clock],
        "share_of_peak": None if peak is None else flops / peak / mine["seconds"],
        "ours": mine,
    }
    if peer is None:
        return row
    if isinstance(peer, str):
        return row | {"peer": peer}
    gap = max(abs(a - b) for a, b in zip(mine["losses"], peer["losses"], strict=True))
    return row | {
        "peer": peer,
        "speedup": peer["seconds"] / mine["seconds"],
        "speedup_cpu": peer["cpu_seconds"] / mine["cpu_seconds"],
        "largest_difference_of_losses": gap,
    }


def line(row: dict[str, Any]) -> str:
    if "left_out" in row:
        return f"{row['name']}: left out, {row['left_out']}"
    mine, peer = row["ours"], row.get("peer", "not measured here")
    peak = "" if row["share_of_peak"] is None else f", MFU {row['share_of_peak']:.3f}"
    memory = "" if mine["peak_bytes"] is None else f", {mine['peak_bytes'] / 1e9:.2f} GB"
    ours = (
        f"{row['name']}: {mine['seconds']:.3f} s ({mine['cpu_seconds']:.3f} of processors), "
        f"{row['tokens_per_second']:.0f} tokens/s, {row['share_of_floor']:.3f} of the floor{peak}{memory}"
    )
    if isinstance(peer, str):
        return f"{ours}; peer: {peer}"
    other = "" if peer["peak_bytes"] is None else f", {peer['peak_bytes'] / 1e9:.2f} GB"
    gap = f"losses within {row['largest_difference_of_losses']:.1e}"
    return (
        f"{ours}; {peer['note']}: {peer['seconds']:.3f} s ({peer['cpu_seconds']:.3f}){other}, "
        f"{row['speedup']:.2f} times ({row['speedup_cpu']:.2f}), {gap}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of names of cases")
    parser.add_argument("--rounds", type=int, help="of both sides in turns (default: 1 on a device, 2 on a CPU)")
    parser.add_argument("--cores", type=int, help="on a CPU: one of them has no threads that wait for each other")
    parser.add_argument("--limit", type=float, default=3000.0, help="seconds after which no more cases are begun")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: checks the script, measures nothing of worth")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, range(options.cores))  # before either library has threads; processes inherit it
    if options.side:
        found = SIDES[options.side](CASES[options.case])
        print(json.dumps(found if isinstance(found, dict) else found._asdict()))
        return
    cpu = jax.default_backend() == "cpu"
    name = "cpu_float32" if cpu else machine()["device"].replace(" ", "-")
    out = options.out or (None if options.smoke else RESULTS / f"finetune_{name}.json")
    record: dict[str, Any] = {"machine": machine(), "cores": options.cores or os.cpu_count(), "rows": []}
    until = time.perf_counter() + options.limit
    for case in SMOKE if options.smoke else ON_CPU if cpu else ON_GPU:
        if not case.name.startswith(tuple(options.cases)) or time.perf_counter() >= until:
            continue
        row = measure(case, options.rounds or (2 if cpu and not options.smoke else 1), until)
        print(line(row), flush=True)
        record["rows"].append(row)
        if out is not None:
            write(out, record)


if __name__ == "__main__":
    main()
