"""How the TPU flash kernels are launched: their grids, the blocks each step loads, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .block_bounds import key_steps, query_steps, visible_pairs
from .tiles import Call, Scalars, visited_block

# The compiler's list scheduler leaves the matrix unit idle during the softmax; this one overlaps them better.
COMPILER_FLAGS = {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True}


@dataclasses.dataclass(frozen=True)
class BlockSpecs:
    """Block specs of one kernel. Its grid is (batch, key head, major block, step).

    With "query", a query block stays while the steps walk over the key blocks that it sees; with "key" the other way
    round. Which block a step loads is read from the prefetched ranges.
    """

    call: Call
    major: Literal["query", "key"]

    def _blocks(self, batch: Array, major: Array, step: Array, refs: Sequence[Any]) -> tuple[Array, Array]:
        scalars = Scalars(*refs)
        minor = visited_block(scalars, scalars.row(self.call, batch, major, self.major_blocks), step)
        return (major, minor) if self.major == "query" else (minor, major)

    @property
    def major_blocks(self) -> int:
        extent = self.call.extent
        return extent.query_blocks if self.major == "query" else extent.key_blocks

    @property
    def steps(self) -> int:
        """Grid steps per major block."""
        return key_steps(self.call.extent) if self.major == "query" else query_steps(self.call.extent)

    def _spec(self, shape: tuple[int | None, ...], index: Callable[[Array, Array, Array, Array], Any]) -> pl.BlockSpec:
        def index_map(batch: Array, head: Array, major: Array, step: Array, *refs: Any) -> Any:
            return index(batch, head, *self._blocks(batch, major, step, refs))

        return pl.BlockSpec(shape, index_map)

    def queries(self, width: int) -> pl.BlockSpec:
        """A query block of all heads of a key head, of an array [B, K, G, T, width]."""
        shape = (None, None, self.call.groups, self.call.extent.query_block, width)
        return self._spec(shape, lambda b, h, i, j: (b, h, 0, i, 0))

    def statistic(self) -> pl.BlockSpec:
        """A query block of an array [B, K, G, 1, T]: one number per query."""
        shape = (None, None, self.call.groups, 1, self.call.extent.query_block)
        return self._spec(shape, lambda b, h, i, j: (b, h, 0, 0, i))

    def keys(self, width: int) -> pl.BlockSpec:
        """A key block of an array [B, K, S, width]."""
        return self._spec((None, None, self.call.extent.key_block, width), lambda b, h, i, j: (b, h, j, 0))

    def key_columns(self, width: int) -> pl.BlockSpec:
        """A key block of an array [B, K, width, S]."""
        return self._spec((None, None, width, self.call.extent.key_block), lambda b, h, i, j: (b, h, 0, j))

    def segments(self) -> list[pl.BlockSpec]:
        """Segment ids of queries [B, 1, T] and of keys [B, S, 1]."""
        extent = self.call.extent
        return [
            self._spec((None, 1, extent.query_block), lambda b, h, i, j: (b, 0, i)),
            self._spec((None, extent.key_block, 1), lambda b, h, i, j: (b, j, 0)),
        ]

    def launch(
        self,
        kernel: Callable[..., None],
        name: str,
        scalars: Scalars,
        inputs: Sequence[tuple[Array, pl.BlockSpec]],
        segments: tuple[Array, ...],
        outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: Sequence[Any],
        cost: pl.CostEstimate,
    ) -> Any:
        """Runs `kernel(*scalars, *inputs, *segments, *outputs, *scratch)` over the grid; returns the outputs."""
        B, K = inputs[0][0].shape[:2]
        prefetched = scalars.prefetched()
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(prefetched),
                grid=(B, K, self.major_blocks, self.steps),
                in_specs=[spec for _, spec in inputs] + (self.segments() if segments else []),
                out_specs=[spec for _, spec in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[shape for shape, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=self.call.vmem_limit_bytes,
                flags=COMPILER_FLAGS,
            ),
            cost_estimate=cost,
            interpret=self.call.interpret,
            name=name,
        )(*prefetched, *[array for array, _ in inputs], *segments)


def kernel_cost(
    call: Call, q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], Hv: int, products: tuple[int, int]
) -> pl.CostEstimate:
    """Operations and bytes over visible pairs of query and key, segments not counted.

    `products` is how many matrix products of width H and of width Hv there are per pair.
    """
    B, K, G, T, H = q.shape
    pairs = B * K * G * visible_pairs(call.extent)
    width = products[0] * H + products[1] * Hv
    key_bytes = B * K * call.extent.query_blocks * key_steps(call.extent) * call.extent.key_block * (H + Hv)
    query_bytes = B * K * G * T * sum(products) * (H + Hv) // 2
    return pl.CostEstimate(
        flops=2 * pairs * width,
        transcendentals=pairs,
        bytes_accessed=int(np.dtype(q.dtype).itemsize * (key_bytes + query_bytes)),
    )
