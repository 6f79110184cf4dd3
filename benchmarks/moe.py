"""One layer of experts on CPU: seconds per call, floors, and transformers' layer in the same run.

    python benchmarks/moe.py [--threads 2] [--smoke]

A layer of an eighth of Mixtral's size, in float32, with 8 experts and with 32 of which as many are chosen: the work
follows the tokens that are routed, so the second may cost more only where more experts are hit. The floor is the larger
of the bytes of the experts that were hit over the rate at which a matrix is read here, and of the operations over the
rate of one large product here; both rates are measured in the same run. Calls of both sides take turns, and the least
of their times counts, on the clock and of processors. Needs the parity extra. Writes benchmarks/results/moe.json.
The kernels of accelerators are grouped.py's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from timing import RESULTS, machine, write
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from ministral_jax.config import ModelConfig, MoEConfig, RopeConfig
from ministral_jax.moe import MoE, route
from ministral_jax.parameters import initialize, parameters


@dataclass(frozen=True)
class Case:
    """One call: `tokens` through a layer."""

    n_experts: int
    tokens: int
    dim: int = 1024
    hidden: int = 1792
    chosen: int = 2


CASES = tuple(Case(n, tokens) for tokens in (1, 4, 16, 128) for n in (8, 32))
SMOKE = (Case(4, 3, 32, 64), Case(20, 3, 32, 64))


def our_layer(case: Case) -> MoE:
    moe = MoEConfig(n_experts=case.n_experts, experts_per_token=case.chosen, expert_hidden_dim=case.hidden)
    config = ModelConfig(
        dim=case.dim, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, hidden_dim=case.hidden, vocab_size=2,
        norm_eps=1e-5, rope=RopeConfig(theta=1e4), windows=(None,), max_length=2, moe=moe,
    )  # fmt: skip
    return initialize(MoE(config, jnp.float32), jax.random.key(0), std=0.02)


# How transformers may go through experts; its own choice where a model is loaded depends on versions.
PEERS = ("eager", "grouped_mm")


def their_layer(case: Case, ours: MoE, implementation: str) -> Any:
    """transformers' layer with our weights: w3 behind w1 in one tensor."""
    config = transformers.MixtralConfig(
        hidden_size=case.dim, intermediate_size=case.hidden, num_local_experts=case.n_experts,
        num_experts_per_tok=case.chosen,
    )  # fmt: skip
    config._experts_implementation = implementation
    layer = MixtralSparseMoeBlock(config).float().eval()
    w = {name: torch.from_numpy(np.array(array)) for name, array in parameters(ours).items()}
    gate_up = torch.cat([w["experts.w1.weight"], w["experts.w3.weight"]], dim=1)
    state = {
        "gate.weight": w["gate.weight"],
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": w["experts.w2.weight"],
    }
    layer.load_state_dict(state)
    return layer


class Seconds(NamedTuple):
    """Of one call: on the clock, and of all processors together, which other work on the machine delays less."""

    wall: float
    cpu: float


def taking_turns(sides: Sequence[Callable[[], Any]], budget: float) -> list[Seconds]:
    """Fewest seconds of each side, one call of each after the other."""
    best = [Seconds(float("inf"), float("inf"))] * len(sides)
    for run in sides:
        run()
    until = time.perf_counter() + budget
    while time.perf_counter() < until:
        for i, run in enumerate(sides):
            began, cpu = time.perf_counter(), time.process_time()
            run()
            took = Seconds(time.perf_counter() - began, time.process_time() - cpu)
            best[i] = Seconds(*map(min, best[i], took))
    return best


def rates(budget: float) -> tuple[float, float]:
    """Bytes of a matrix-vector product and operations of a large product, per second of a processor, in float32."""
    matrix, vector = np.ones((1792, 8192), np.float32), np.ones(8192, np.float32)
    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda a, b: a @ b.T)
    seconds = taking_turns(
        [lambda: matrix @ vector, lambda: product(square, square).block_until_ready()],
        budget,
    )
    return matrix.nbytes / seconds[0].cpu, 2 * 1024**3 / seconds[1].cpu


def measure(case: Case, bandwidth: float, operations: float, budget: float) -> dict[str, Any]:
    ours = our_layer(case)
    x = np.random.default_rng(0).standard_normal((case.tokens, case.dim)).astype(np.float32)
    hit = len(np.unique(route(ours.gate(jnp.asarray(x)), ours.moe).experts))
    graph, weights = nnx.split(ours)
    compiled = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))
    on_device, for_them = jnp.asarray(x), torch.from_numpy(x)[None]

    def run_ours() -> jax.Array:
        return compiled(weights, on_device).block_until_ready()

    def theirs(implementation: str) -> Callable[[], Any]:
        layer = their_layer(case, ours, implementation)

        def run() -> Any:
            with torch.no_grad():
                out = layer(for_them)
            return out[0] if isinstance(out, tuple) else out

        return run

    peers = [theirs(implementation) for implementation in PEERS]
    difference = np.abs(np.asarray(run_ours()) - peers[0]().reshape(x.shape).numpy()).max()
    seconds, *others = taking_turns([run_ours, *peers], budget)
    peer = Seconds(*map(min, *others))
    matrices = 3 * case.dim * case.hidden
    floor = max(4 * hit * matrices / bandwidth, 2 * case.tokens * case.chosen * matrices / operations)
    return asdict(case) | {
        "experts_hit": hit,
        "wall_milliseconds": round(1e3 * seconds.wall, 3),
        "cpu_milliseconds": round(1e3 * seconds.cpu, 3),
        "floor_cpu_milliseconds": round(1e3 * floor, 3),
        "share_of_floor": round(floor / seconds.cpu, 3),
        "transformers": {
            name: {"wall_milliseconds": round(1e3 * one.wall, 3), "cpu_milliseconds": round(1e3 * one.cpu, 3)}
            for name, one in zip(PEERS, others, strict=True)
        },
        "speedup_wall": round(peer.wall / seconds.wall, 2),
        "speedup_cpu": round(peer.cpu / seconds.cpu, 2),
        "largest_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = 0.05 if options.smoke else options.seconds
    bandwidth, operations = rates(budget)
    print(f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {operations / 1e9:.0f} GFLOP/s, load {os.getloadavg()[0]:.1f}")
    rows = []
    for case in SMOKE if options.smoke else CASES:
        rows.append(measure(case, bandwidth, operations, budget))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items() if key not in ("dim", "hidden", "chosen")))
    if not options.smoke:
        record = machine() | {
            "threads": options.threads,
            "load_average": os.getloadavg()[0],
            "bytes_per_second": bandwidth,
            "operations_per_second": operations,
            "rows": rows,
        }
        write(RESULTS / "moe.json", record)


if __name__ == "__main__":
    main()
