"""Load, generate and train one step, for comparison between devices and processes. No tests here.

As a program, one of two processes: python whole_path.py MODEL MESH RESULT HOST:PORT ID.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.safetensors import SafetensorsFile
from ministral_jax.parameters import parameters
from ministral_jax.sharding import hosts
from train.data.batches import Batch
from train.optimizer import Optimizer, OptimizerConfig
from train.step import BATCH_AXES, TrainStep, trained_specs

PROMPTS = [[1, 5, 9], [7, 3, 100, 22, 64, 31, 8, 90, 2, 17]]
NEW_TOKENS = 8
ROWS, LENGTH = 8, 12


def whole_path(folder: Path, mesh: str | None) -> dict[str, np.ndarray]:
    """Everything that has to be the same however many devices and processes there are, in every process."""
    results: dict[str, np.ndarray] = {}
    with counted_reading() as read:
        model = load_model(folder, dtype="float32", mesh=mesh)
    results["own bytes"] = np.array([sum(read), own_bytes(parameters(model))])
    params = SamplingParams(max_tokens=NEW_TOKENS, logprobs=0)
    completions = Generator(model).generate(PROMPTS, params)
    results["ids"] = np.array([completion.ids for completion in completions])
    results["logprobs"] = np.array([[entry.logprob for entry in completion.logprobs] for completion in completions])

    stacked = load_model(folder, dtype="float32", mesh=mesh, stacked=True)
    # A large epsilon, so that a gradient of rounding errors is not blown up to a whole step.
    config = OptimizerConfig(learning_rate=0.1, steps=10, epsilon=1e-2, schedule="constant")
    step = TrainStep(stacked, Optimizer(config, trained_specs(stacked)), options={"xla_backend_optimization_level": 0})
    batch = some_batch()
    if step.layout is not None:
        batch = step.layout.put(batch, *BATCH_AXES)
    state, metrics = step(step.initial_state(stacked, jax.random.key(7)), batch)
    results |= {name: np.asarray(getattr(metrics, name)) for name in ("loss", "tokens", "gradient_norm", "finite")}
    trained = multihost_utils.process_allgather(state.trained, tiled=True)
    return results | {f"trained {name}": np.asarray(array) for name, array in trained.items()}


@contextmanager
def counted_reading() -> Iterator[list[int]]:
    """Lists the sizes of all that is read from weight files, headers aside."""
    sizes: list[int] = []
    original = SafetensorsFile._read_bytes

    def counting(self: SafetensorsFile, name: str, begin: int, out: np.ndarray) -> None:
        sizes.append(out.nbytes)
        original(self, name, begin, out)

    SafetensorsFile._read_bytes = counting
    try:
        yield sizes
    finally:
        SafetensorsFile._read_bytes = original


def own_bytes(arrays: dict[str, jax.Array]) -> int:
    """Bytes of the distinct shards that the devices of this process hold."""
    return sum(
        sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values())
        for array in arrays.values()
    )


def some_batch() -> Batch:
    """One microbatch [1, B, T] with a few tokens that do not count."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (1, ROWS, LENGTH + 1)).astype(np.int32)
    weights = (rng.uniform(size=(1, ROWS, LENGTH)) < 0.7).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), weights.shape).copy()
    return Batch(tokens[..., :-1], tokens[..., 1:], weights, positions, np.ones(weights.shape, np.int32))


def main(folder: str, mesh: str, result: str, coordinator: str, process_id: str) -> None:
    hosts.start(hosts.HostOptions(coordinator, 2, int(process_id), start_seconds=100), supervised=True)
    results = whole_path(Path(folder), mesh)
    np.savez(Path(result), **results)
    print(json.dumps({"devices": jax.device_count()}), flush=True)
    hosts.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
