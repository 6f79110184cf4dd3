"""Runs sequences through a paged cache in any schedule of calls, as a test wants it. Holds no tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infer.pages import PageTables
from ministral_jax.cache import PagedBatch, PagedCache, allocate_cache, plan_cache
from ministral_jax.transformer import Transformer

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # these tests compile more than they compute


def jitted(model: Transformer, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(model, ...)` compiled, with the weights as an argument."""
    graph, weights = nnx.split(model)
    compiled = jax.jit(lambda weights, *rest: method(nnx.merge(graph, weights), *rest), compiler_options=QUICK)
    return functools.partial(compiled, weights)


class PagedRunner:
    """One compiled `extend` of `rows` packed tokens for `batch` sequences of up to `length` tokens.

    Every run begins with pools full of NaN, so that reading a place that was not written shows.
    """

    def __init__(self, model: Transformer, *, batch: int, rows: int, length: int, page_size: int) -> None:
        self.batch, self.rows = batch, rows
        dtype = jnp.dtype(jnp.float32)
        self.plan = plan_cache(model.config, batch=batch, length=length, chunk=rows, page_size=page_size, dtype=dtype)
        self._empty = jax.tree.map(
            lambda pool: jnp.full_like(pool, jnp.nan), allocate_cache(model.config, self.plan, dtype)
        )
        self._extend = jitted(model, self._logits)

    @staticmethod
    def _logits(model: Transformer, tokens: Any, cache: PagedCache, batch: PagedBatch) -> tuple[Any, PagedCache]:
        hidden, cache = model.extend(tokens, cache, batch)
        return model.logits(hidden), cache

    def run(self, sequences: Sequence[np.ndarray], schedule: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits [n, V] of each sequence; call i brings up to `schedule[i][b]` tokens of sequence b."""
        tables, cache = PageTables(self.plan, self.batch), self._empty
        done = np.zeros(self.batch, np.int32)
        logits: list[list[np.ndarray]] = [[] for _ in sequences]
        for asked in schedule:
            counts = np.zeros(self.batch, np.int32)
            for b, sequence in enumerate(sequences):
                counts[b] = min(asked[b], len(sequence) - done[b], self.rows - counts.sum())
                if counts[b]:
                    tables.advance(b, int(done[b]), int(done[b] + counts[b]))
            starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            tokens = np.zeros(self.rows, np.int32)
            for b, sequence in enumerate(sequences):
                tokens[starts[b] : starts[b + 1]] = sequence[done[b] : done[b] + counts[b]]
            done = done + counts
            batch = PagedBatch(
                tuple(jnp.asarray(t.copy()) for t in tables.tables), jnp.asarray(starts), jnp.asarray(done)
            )
            out, cache = self._extend(jnp.asarray(tokens), cache, batch)
            for b in range(len(sequences)):
                logits[b].append(np.asarray(out)[starts[b] : starts[b + 1]])
        assert [len(sequence) for sequence in sequences] == done[: len(sequences)].tolist(), "the schedule is too short"
        return [np.concatenate(parts) for parts in logits]
