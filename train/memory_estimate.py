"""What a compiled training step needs of a device's memory, told before its first run and refused if it cannot fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from ministral_jax.errors import ConfigError

from .step import TrainStep

_GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device: weights and batch, float32 copies that are trained, their moments, and what a step adds."""

    weights: int
    trained: int
    moments: int
    temporary: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.trained + self.moments + self.temporary

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "trained in float32": self.trained,
            "moments": self.moments,
            "activations and gradients": self.temporary,
        }
        listed = ", ".join(f"{name} {n_bytes / _GIB:.2f}" for name, n_bytes in parts.items())
        return f"{self.total / _GIB:.2f} GiB on each device ({listed})"


def estimate(step: TrainStep, microbatches: int, rows: int, length: int) -> MemoryEstimate:
    """Compiles `step` for batches of this shape, and says what the compiler says of its memory."""
    analysis: Any = step.compile(microbatches, rows, length).memory_analysis()
    state, _ = step.shapes(microbatches, rows, length)
    trained, moments = _bytes_of(state.trained), _bytes_of(state.moments)
    arguments = analysis.argument_size_in_bytes
    fresh = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)  # the rest takes the old one's place
    return MemoryEstimate(arguments - trained - moments, trained, moments, analysis.temp_size_in_bytes + fresh)


def require_fits(needed: MemoryEstimate, there: int | None) -> None:
    """Raises ConfigError with the numbers where a device has less than is needed; None: it does not tell."""
    if there is not None and needed.total > there:
        raise ConfigError(
            f"a step needs {needed}, and there are {there / _GIB:.2f} GiB: take fewer tokens at a time (batch_size, "
            "seq_len; num_microbatches makes up for it), remat: full, more devices (mesh), or a quantised base"
        )


def _bytes_of(tree: Any) -> int:
    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))
