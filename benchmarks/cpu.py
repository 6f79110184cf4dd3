"""Decode and prefill on CPU against transformers, in the same run: tokens per second and their ratio.

    python benchmarks/cpu.py [--dtype float32 bfloat16] [--threads 2] [--smoke]

A random Mistral of about 0.3 B parameters is written once and both sides read it. Each side runs in a process of its
own, one after the other, so that their thread pools do not meet. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Workload:
    """Sizes of the model and of the two measurements."""

    dim: int = 1024
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 64
    hidden_dim: int = 4096
    vocab_size: int = 32000
    window: int = 1024
    prefill_tokens: int = 2048
    decode_prompt: int = 512
    decode_tokens: int = 64
    repeats: int = 3


SMOKE = Workload(64, 2, 4, 2, 16, 128, 256, 32, 64, 16, 8)


def write_model(directory: Path, load: Workload) -> None:
    """A random model in the HF layout, float32, as both sides read it."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=load.dim,
        num_hidden_layers=load.n_layers,
        num_attention_heads=load.n_heads,
        num_key_value_heads=load.n_kv_heads,
        head_dim=load.head_dim,
        intermediate_size=load.hidden_dim,
        vocab_size=load.vocab_size,
        sliding_window=load.window,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    MistralForCausalLM(config).save_pretrained(directory)


def prompt(load: Workload, n: int) -> list[int]:
    """The same arbitrary token ids on both sides."""
    return [3 + (7919 * i) % (load.vocab_size - 3) for i in range(n)]


def best(run, repeats: int) -> float:
    """Fewest seconds of `repeats` runs after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measure_ours(directory: Path, load: Workload, dtype: str, threads: int) -> dict[str, float]:
    """Tokens per second of the project's generator."""
    import jax.numpy as jnp

    import ministral_jax
    from infer.generate import Generator
    from infer.sampling import SamplingParams

    generator = Generator(ministral_jax.load(directory, dtype=jnp.dtype(dtype)))

    def run(n_prompt: int, n_new: int) -> float:
        return best(
            lambda: generator.generate([prompt(load, n_prompt)], SamplingParams(max_tokens=n_new)), load.repeats
        )

    return rates(run, load)


def measure_transformers(directory: Path, load: Workload, dtype: str, threads: int) -> dict[str, float]:
    """Tokens per second of transformers' generate with its default cache and scaled-dot-product attention."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    def run(n_prompt: int, n_new: int) -> float:
        ids = torch.tensor([prompt(load, n_prompt)])
        with torch.inference_mode():
            return best(
                lambda: model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n_new,
                    min_new_tokens=n_new,
                    do_sample=False,
                    pad_token_id=0,
                ),
                load.repeats,
            )

    return rates(run, load)


def rates(run, load: Workload) -> dict[str, float]:
    """Prefill from a prompt with one new token; decode from the extra time of more new tokens after the same prompt."""
    prefill = run(load.prefill_tokens, 1)
    short = run(load.decode_prompt, 1)
    long = run(load.decode_prompt, 1 + load.decode_tokens)
    return {"prefill": load.prefill_tokens / prefill, "decode": load.decode_tokens / (long - short)}


SIDES = {"ministral-jax": measure_ours, "transformers": measure_transformers}


def run_side(side: str, directory: Path, dtype: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", str(directory), "--dtype", dtype]
    command += [
        "--threads",
        str(arguments.threads),
        "--repeats",
        str(arguments.repeats),
        "--divide",
        str(arguments.divide),
    ]
    command += ["--smoke"] if arguments.smoke else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="timed runs after one that warms up; the best counts")
    parser.add_argument(
        "--divide", type=int, default=1, help="cut prompts and answers to this fraction, for slow dtypes"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: checks the script, measures nothing of worth")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    load = SMOKE if arguments.smoke else Workload()
    load = replace(
        load,
        repeats=arguments.repeats,
        prefill_tokens=load.prefill_tokens // arguments.divide,
        decode_prompt=load.decode_prompt // arguments.divide,
        decode_tokens=load.decode_tokens // arguments.divide,
    )
    if arguments.side:
        measured = SIDES[arguments.side](arguments.model, load, arguments.dtype[0], arguments.threads)
        print(json.dumps(measured))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), load)
        for dtype in arguments.dtype:
            rows[dtype] = {side: run_side(side, Path(directory), dtype, arguments) for side in SIDES}
    report(rows, load, arguments.threads, arguments.smoke)


def report(rows: dict, load: Workload, threads: int, smoke: bool) -> None:
    """Prints the table and keeps it as JSON, unless it was a smoke run."""
    print(f"{'dtype':10}{'phase':10}{'ministral-jax':>16}{'transformers':>16}{'ratio':>8}   tokens/s")
    for dtype, sides in rows.items():
        for phase in ("prefill", "decode"):
            ours, theirs = sides["ministral-jax"][phase], sides["transformers"][phase]
            print(f"{dtype:10}{phase:10}{ours:16.1f}{theirs:16.1f}{ours / theirs:8.2f}")
    if smoke:
        return
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": f"{platform.machine()}, {threads} threads",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "transformers")},
        "workload": asdict(load),
        "tokens_per_second": rows,
    }
    target = RESULTS / f"cpu_{'_'.join(rows)}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, target)
    print(f"written to {target}")


if __name__ == "__main__":
    main()
