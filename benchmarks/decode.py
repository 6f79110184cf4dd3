"""Decoding on an accelerator: attention alone, the whole step, and a long prompt, each against its floor of bytes.

    python benchmarks/decode.py [--parts attention step prompt] [--models ...] [--out FILE] [--smoke]

The floor is bytes over the copy bandwidth that this run measures first. Attention: the visible keys and values. A step:
all weights but the input embeddings, and the visible keys and values. Batch 1 of Ministral 8B is also timed in
transformers, with its static cache and torch.compile, where they are installed. Weights are random: time does not
depend on them. Rows that do not fit in the device's memory are left out, and said. `--smoke` uses tiny sizes on any
device: it checks this script, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import RESULTS, best_seconds, machine, write
from infer.decoding import MAX_STEPS, DecodeState, Ends, compiled_steps
from infer.pages import PageTables
from infer.sampling import SamplingParams, batch_arrays, batch_mode, start_history
from ministral_jax.cache import CachePlan, PagedBatch, PagedCache, allocate_cache, plan_cache
from ministral_jax.catalog import find
from ministral_jax.config import ModelConfig
from ministral_jax.linear import projections
from ministral_jax.parameters import ParameterSpec, fill
from ministral_jax.quantization import LinearFormat
from ministral_jax.transformer import Transformer
from pallas_kernels import paged_attention

CHUNK = 4096  # prompt tokens of one call
REPEATS = 16  # attention calls of one program, each waiting for the one before: launches do not count
PEER_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Attention:
    """One decode call of attention: a query per sequence, all sequences of one length."""

    batch: int
    length: int
    window: int | None = None
    page: int = 64
    pool: str = "bfloat16"
    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    def visible_bytes(self) -> int:
        seen = min(self.length, self.window or self.length)
        return 2 * self.batch * seen * self.kv_heads * self.width * jnp.dtype(self.pool).itemsize

    def pool_bytes(self) -> int:
        return 2 * self.batch * self.length * self.kv_heads * self.width * jnp.dtype(self.pool).itemsize


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step of a published model's shape."""

    model: str
    batch: int
    length: int


ATTENTION = [
    *(Attention(batch, length) for batch in (1, 8, 64) for length in (1024, 4096, 32768, 131072)),
    *(Attention(batch, 131072, window=32768) for batch in (1, 8, 64)),
    Attention(64, 32768, window=4096),
    Attention(1, 4096, page=16),
    Attention(64, 4096, page=16),
    Attention(64, 4096, page=256),
    *(Attention(64, length, pool=pool) for length in (4096, 32768) for pool in ("float8_e4m3fn", "int8")),
]
MODELS = (
    "ministral-8b-instruct-2410",
    "ministral-3-3b-instruct-2512",
    "ministral-3-8b-instruct-2512",
    "ministral-3-14b-instruct-2512",
)
SMOKE = "smoke"
SHAPES = [(batch, length) for batch in (1, 8, 64) for length in (1024, 32768, 131072)]


def device_bytes() -> float:
    """Memory of the device, less a margin for temporaries; without a limit where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return 0.9 * stats["bytes_limit"] if "bytes_limit" in stats else float("inf")


def copy_bandwidth(n_bytes: int, budget: float) -> float:
    """Bytes per second, read and written, of a plain pass over an array."""
    array = jnp.ones(n_bytes // 4, jnp.float32)
    run = jax.jit(lambda array: array + 1.0)
    return 2 * n_bytes / best_seconds(lambda: run(array), jax.block_until_ready, budget)


def attention_seconds(shape: Attention, budget: float) -> float:
    """Seconds of one call; the calls of a program wait for each other."""
    pages = -(-shape.length // shape.page)
    pool = jnp.ones((shape.batch * pages + 1, shape.page, shape.kv_heads, shape.width), jnp.dtype(shape.pool))
    table = 1 + jnp.arange(shape.batch * pages, dtype=jnp.int32).reshape(shape.batch, pages)
    starts = jnp.arange(shape.batch + 1, dtype=jnp.int32)
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)
    q = jax.random.normal(jax.random.key(0), (shape.batch, shape.heads, shape.width), jnp.bfloat16)

    @jax.jit
    def run(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        def once(_: int, q: jax.Array) -> jax.Array:
            return paged_attention(q, keys, values, table, starts, lengths, window=shape.window)

        return jax.lax.fori_loop(0, REPEATS, once, q)

    values = pool + jnp.ones((), pool.dtype) if shape.pool != "float8_e4m3fn" else jnp.copy(pool)
    return best_seconds(lambda: run(q, pool, values), jax.block_until_ready, budget) / REPEATS


def measure_attention(shapes: list[Attention], bandwidth: float, budget: float) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        row: dict[str, Any] = {"part": "attention", **dataclasses.asdict(shape)}
        if shape.pool_bytes() > device_bytes():
            yield row | {"left_out": f"the pools take {shape.pool_bytes() / 1e9:.0f} GB"}
            continue
        seconds = attention_seconds(shape, budget)
        yield row | rates(seconds, shape.visible_bytes(), bandwidth)


def rates(seconds: float, n_bytes: int, bandwidth: float) -> dict[str, float]:
    """Microseconds, bytes per second, and the share of the floor."""
    return {
        "microseconds": 1e6 * seconds,
        "bytes": n_bytes,
        "terabytes_per_second": n_bytes / seconds / 1e12,
        "floor_microseconds": 1e6 * n_bytes / bandwidth,
        "share_of_floor": n_bytes / bandwidth / seconds,
    }


def random_model(config: ModelConfig, stored: LinearFormat | None = None) -> Transformer:
    """The model with random weights, drawn on the device: bfloat16, or its projections as `stored`."""
    model = Transformer(dataclasses.replace(config, quantization=None), jnp.bfloat16)
    if stored is not None:
        for projection in projections(model).values():
            projection.store_as(stored)

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        key = jax.random.key(zlib.crc32(name.encode()))
        if spec.dtype == jnp.int8:
            return jax.random.randint(key, spec.shape, -127, 128, jnp.int8)
        if spec.init == "stored":
            return jnp.full(spec.shape, 0.02 / 73, spec.dtype)  # 73 is what such integers deviate by
        return 0.02 * jax.random.normal(key, spec.shape, spec.dtype)

    return fill(model, draw)


@dataclasses.dataclass
class Decoder:
    """A model with a cache whose sequences all hold `length` tokens, ready to decode."""

    model: Transformer
    batch: int
    length: int
    page: int = 64

    def __post_init__(self) -> None:
        graph, self.weights = nnx.split(self.model)
        self.steps = compiled_steps(graph)
        self.params = [SamplingParams(ignore_eos=True)] * self.batch
        self.cache = allocate_cache(self.model.config, self.plan, jnp.dtype(jnp.bfloat16))
        tables = PageTables(self.plan, self.batch)
        for sequence in range(self.batch):
            for start in range(0, self.plan.length, CHUNK):
                tables.advance(sequence, start, min(start + CHUNK, self.plan.length))
        self.tables = tuple(jnp.asarray(table.copy()) for table in tables.tables)

    @functools.cached_property
    def plan(self) -> CachePlan:
        return plan_for(self.model.config, self.batch, self.length, self.page)

    def state(self) -> DecodeState:
        zeros = jnp.zeros(self.batch, jnp.int32)
        history = start_history([[0]] * self.batch, self.model.config.vocab_size, batch_mode(self.params))
        lengths = jnp.full(self.batch, self.length, jnp.int32)
        return DecodeState(jnp.copy(zeros), lengths, zeros, jnp.ones(self.batch, bool), history)

    def decode(self, n_steps: int) -> None:
        """`n_steps` steps from `length` on, waited for."""
        ends = Ends(jnp.full((self.batch, 1), -1, jnp.int32), jnp.full(self.batch, 1 << 30, jnp.int32))
        self.cache, state, produced = self.steps.decode(
            self.weights,
            self.cache,
            self.state(),
            self.tables,
            ends,
            batch_arrays(self.params),
            jnp.asarray(n_steps, jnp.int32),
            mode=batch_mode(self.params),
        )
        jax.block_until_ready((state, produced))

    def seconds_per_step(self, budget: float) -> float:
        """From the difference of a long and a short call, so that what a call costs once does not count."""

        def best(n_steps: int) -> float:
            return best_seconds(lambda: self.decode(n_steps), lambda _: None, budget)

        return (best(MAX_STEPS) - best(MAX_STEPS // 4)) / (MAX_STEPS - MAX_STEPS // 4)


def named(name: str) -> ModelConfig:
    """A published model's config, or one of no use but to try this script."""
    if name != SMOKE:
        return find(name).config
    published = find(MODELS[0]).config
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48}
    return dataclasses.replace(published, **sizes, vocab_size=96, windows=(None, 24), max_length=256)


def plan_for(config: ModelConfig, batch: int, length: int, page: int) -> CachePlan:
    longest = length + MAX_STEPS
    dtype = jnp.dtype(jnp.bfloat16)
    return plan_cache(config, batch=batch, length=longest, chunk=CHUNK, page_size=page, dtype=dtype)


def step_bytes(model: Transformer, batch: int, length: int) -> int:
    """What a step must read: every weight once (of the input embeddings only rows), and the visible keys and values."""
    config = model.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    if not config.tied_embeddings:
        weights -= model.tok_embeddings.weight[...].nbytes
    seen = sum(min(length, window or length) for window in config.windows)
    return weights + 2 * 2 * batch * seen * config.n_kv_heads * config.head_dim


def measure_steps(names: list[str], bandwidth: float, budget: float) -> Iterator[dict[str, Any]]:
    for name in names:
        model = random_model(named(name))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        for batch, length in SHAPES if name != SMOKE else [(2, 40)]:
            if length + MAX_STEPS > model.config.max_length:
                length = model.config.max_length - MAX_STEPS
            row: dict[str, Any] = {"part": "step", **dataclasses.asdict(Step(name, batch, length))}
            needed = weights + plan_for(model.config, batch, length, 64).n_bytes
            if needed > device_bytes():
                yield row | {"left_out": f"weights and cache take {needed / 1e9:.0f} GB"}
                continue
            seconds = Decoder(model, batch, length).seconds_per_step(budget)
            measured = rates(seconds, step_bytes(model, batch, length), bandwidth)
            if name == MODELS[0] and batch == 1 and length == 1024:
                measured |= {"transformers": transformers_seconds(model.config, length)}
            yield row | measured | {"tokens_per_second": batch / seconds}
        del model


def transformers_seconds(config: ModelConfig, length: int) -> float | str:
    """Seconds of a step of transformers with a static cache and torch.compile, or why there are none."""
    try:
        import torch
        from transformers import MistralConfig, MistralForCausalLM, StaticCache

        config_of: Any = MistralConfig  # its keywords are checked when it is called

        shape = config_of(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            sliding_window=None,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa",
        )
        prefill: Any
        forward: Any
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = MistralForCausalLM(shape).eval()
        cache = StaticCache(config=shape, max_cache_len=length + 2 * PEER_TOKENS)
        prefill, forward = model, torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        with torch.inference_mode():
            ids = torch.ones((1, length), dtype=torch.long, device="cuda")
            prefill(ids, past_key_values=cache, cache_position=torch.arange(length, device="cuda"), logits_to_keep=1)
            one = torch.ones((1, 1), dtype=torch.long, device="cuda")

            def decode(begin: int) -> float:
                torch.cuda.synchronize()
                began = time.perf_counter()
                for i in range(PEER_TOKENS):
                    forward(one, past_key_values=cache, cache_position=torch.tensor([begin + i], device="cuda"))
                torch.cuda.synchronize()
                return (time.perf_counter() - began) / PEER_TOKENS

            decode(length)  # compiles
            return decode(length + PEER_TOKENS)
    except Exception as error:  # a peer may fail in any way; the run goes on and says why
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def measure_prompt(name: str, length: int) -> dict[str, Any]:
    """A prompt of `length` tokens with int8 weights, the second time over, with what the device held at most."""
    model = random_model(named(name), LinearFormat("int8_channel", "dynamic"))
    decoder = Decoder(model, 1, length)
    tables = PageTables(decoder.plan, 1)
    cache: PagedCache = decoder.cache
    hidden = jnp.zeros((1, model.config.dim), jnp.bfloat16)
    seconds = 0.0
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        tables.release(0)
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            tables.advance(0, start, stop)
            batch = PagedBatch(
                tuple(jnp.asarray(table.copy()) for table in tables.tables),
                jnp.array([0, stop - start], jnp.int32),
                jnp.array([stop], jnp.int32),
            )
            tokens = jnp.asarray(np.arange(CHUNK, dtype=np.int32) % 1000)
            last = jnp.array([stop - start - 1], jnp.int32)
            hidden, cache = decoder.steps.prefill(decoder.weights, cache, hidden, tokens, batch, last)
        jax.block_until_ready(hidden)
        seconds = time.perf_counter() - began
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "part": "prompt",
        "model": name,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": peak,
    }


def line(row: dict[str, Any]) -> str:
    what = " ".join(f"{value}" for key, value in row.items() if key in ("part", "model", "batch", "length", "window"))
    if "left_out" in row:
        return f"{what}: left out, {row['left_out']}"
    if row["part"] == "prompt":
        return f"{what}: {row['seconds']:.2f} s, {row['tokens_per_second']:.0f} tokens/s"
    extra = f", page {row['page']}, {row['pool']}" if row["part"] == "attention" else ""
    peer = f", transformers {row['transformers']}" if "transformers" in row else ""
    return (
        f"{what}{extra}: {row['microseconds']:.1f} us, {row['terabytes_per_second']:.2f} TB/s, "
        f"{row['share_of_floor']:.2f} of the floor{peer}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("attention", "step", "prompt"), default=["attention", "step"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/decode-DEVICE.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "rows": []}
    bandwidth = copy_bandwidth((1 << 22) if options.smoke else (2 << 30), options.seconds)
    record["copy_bytes_per_second"] = bandwidth
    print(json.dumps(record["machine"]), f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    device = record["machine"]["device"].replace(" ", "-")
    out = options.out or RESULTS / f"decode-{device}.json"
    for row in rows_of(options, bandwidth):
        print(line(row), flush=True)
        record["rows"].append(row)
        if not options.smoke or options.out:
            write(out, record)


def rows_of(options: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The measurements asked for, one by one."""
    if "attention" in options.parts:
        tiny = [Attention(2, 96, window=40, page=16, heads=4, kv_heads=2, width=16)]
        yield from measure_attention(tiny if options.smoke else ATTENTION, bandwidth, options.seconds)
    models = [SMOKE] if options.smoke else options.models
    if "step" in options.parts:
        yield from measure_steps(models, bandwidth, options.seconds)
    if "prompt" in options.parts:
        yield measure_prompt(models[0], 100 if options.smoke else 131072)


if __name__ == "__main__":
    main()
