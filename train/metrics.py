"""What a run tells of itself: rows of JSONL files, operations per step, a line of progress. No training here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ministral_jax.config import ModelConfig
from ministral_jax.memory import count_parameters

from .data.batches import PADDING_SEGMENT, Batch

TRAIN_FILE, EVAL_FILE, SAMPLES_FILE = "metrics.train.jsonl", "metrics.eval.jsonl", "samples.jsonl"

# Dense bfloat16 operations per second, by the vendors' data sheets; the longest name that a device's kind begins with.
PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}


class MetricsFile:
    """Rows with a `step` in a JSONL file; each is on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row; numbers that are not finite become null."""
        text = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are whole: a killed run may leave a part of its last."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row

    def cut_after(self, step: int) -> None:
        """Drops the rows of later steps, which a run that was resumed takes again."""
        if not self.path.exists():
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(partial, self.path)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def perplexity(loss: float) -> float:
    """e to a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def tokens_in(batch: Batch) -> int:
    """Predictions in a batch of any leading axes that are not padding."""
    return int(np.count_nonzero(batch.segment_ids != PADDING_SEGMENT))


def step_flops(config: ModelConfig, batch: Batch, *, full: bool, reference: bool = False) -> float:
    """Useful operations of a step, padding left out and nothing counted twice for rematerialisation.

    Per token 4 P with frozen weights, 6 P where all are trained, P being the parameters of the products a token goes
    through, the head among them; and 12 H N for each key that a query of a layer sees, forward and backward. With a
    `reference`, which goes forward only, 2 P and 4 H N more.
    """
    count = count_parameters(config)
    multiplied = count.active - count.norms - (0 if config.tied_embeddings else count.embeddings)
    seen = np.asarray(batch.positions)[np.asarray(batch.segment_ids) != PADDING_SEGMENT] + 1  # keys, without windows
    pairs = sum(int(np.minimum(seen, window or seen.max(initial=1)).sum()) for window in config.windows)
    per_parameter, per_pair = (6 if full else 4) + 2 * reference, 12 + 4 * reference
    return float(per_parameter * multiplied * seen.size + per_pair * config.head_dim * config.n_heads * pairs)


def peak_flops(kind: str, n_devices: int) -> float | None:
    """Of so many devices together; None if their kind is not known."""
    fitting = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(fitting, key=len)] * n_devices if fitting else None


def device_memory() -> int | None:
    """Bytes that a device has for us; None where it does not tell, as CPUs do not."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def peak_memory() -> int | None:
    """Most bytes that were in use on this process's first device; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def progress_line(row: Mapping[str, Any], max_steps: int) -> str:
    """A row of the training metrics for people."""
    parts = [f"step {row['step']}/{max_steps}", f"loss {row['loss']:.4f}"]
    if "accuracy" in row:
        parts.append(f"accuracy {row['accuracy']:.2f}")
    parts.append(f"rate {row['learning_rate']:.3g}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {100 * row['mfu']:.1f}%")
    if row["peak_bytes"] is not None:
        parts.append(f"memory {row['peak_bytes'] / 2**30:.2f} GiB")
    parts.append(f"{duration(row['eta_seconds'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:04:05."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole_seconds:02}"
