"""The compiled steps of generation: a prefill chunk, the first token, and a loop of decode steps on the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ministral_jax.cache import PagedBatch, PagedCache
from ministral_jax.sharding.layout import Layout
from ministral_jax.transformer import Transformer
from ministral_jax.vision_adapter import ImageRows
from pallas_kernels.dispatch import target

from .sampling import Choice, History, SamplingArrays, SamplingMode, choose, record

MAX_STEPS = 64  # decode steps of one call at most: the length of the buffers that bring tokens back


# On TPU7x XLA would rather have 16-bit weights in tiles of 16 rows, and copies all of them before the decode loop: as
# much memory again. This leaves them as they lie.
TPU7X_OPTIONS = {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}


class Ends(NamedTuple):
    """What ends each sequence: its stop tokens (-1 fills the row) and how many tokens it may have in all."""

    stop_ids: Int[Array, "B stops"]
    limit: Int[Array, "B"]


class DecodeState(NamedTuple):
    """A batch between decode steps. `tokens` are chosen but not yet in the cache; `lengths` count what is in it."""

    tokens: Int[Array, "B"]
    lengths: Int[Array, "B"]
    produced: Int[Array, "B"]
    active: Bool[Array, "B"]
    history: History


class Produced(NamedTuple):
    """What one call brings back: a row per step. Rows from `n_steps` on, and inactive sequences, mean nothing."""

    choices: Choice
    active: Bool[Array, "steps B"]
    n_steps: Int[Array, ""]


class Steps(NamedTuple):
    """The compiled functions of one model."""

    prefill: Any
    start: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def compiled_steps(graph: Any) -> Steps:
    """The steps of every model with this nnx graph, compiled on first use and shared between generators."""
    return Steps(
        prefill=jax.jit(functools.partial(prefill, graph), donate_argnames=("cache", "hidden")),
        start=jax.jit(functools.partial(start, graph), static_argnames=("mode",), donate_argnames=("history",)),
        decode=jax.jit(
            functools.partial(decode, graph),
            static_argnames=("mode",),
            donate_argnames=("cache", "state"),
            compiler_options=decode_options(),
        ),
    )


def decode_options() -> dict[str, Any] | None:
    """Compiler options of the decode loop for the device compiled for."""
    return TPU7X_OPTIONS if "TPU7" in target().kind else None


def prefill(
    graph: Any,
    weights: Any,
    cache: PagedCache,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "T"],
    batch: PagedBatch,
    last_rows: Int[Array, "B"],
    images: ImageRows | None = None,
) -> tuple[Float[Array, "B D"], PagedCache]:
    """One chunk of packed prompt tokens; `images` has what stands in for those of images.

    `last_rows[b]` is the row of sequence b's last prompt token, within its data shard, if it is in this chunk, else
    -1; `hidden` collects the final hidden states of those rows.
    """
    model: Transformer = nnx.merge(graph, weights)
    out, cache = model.extend(tokens, cache, batch, images)
    shards = data_shards(model.layout)
    rows = jnp.maximum(last_rows, 0).reshape(shards, -1, 1)
    last = jnp.take_along_axis(out.reshape(shards, -1, out.shape[-1]), rows, axis=1).reshape(hidden.shape)
    return _in_rows(jnp.where(last_rows[:, None] >= 0, last, hidden), model.layout), cache


def data_shards(layout: Layout | None) -> int:
    """Into how many runs the sequences of a batch are dealt."""
    return 1 if layout is None else layout.ways("rows")


def _in_rows(tree: Any, layout: Layout | None) -> Any:
    """Arrays with an entry per sequence, kept where the sequences are: the next call then finds what it was compiled
    for."""
    return tree if layout is None else jax.tree.map(lambda x: layout.constrain(x, "rows"), tree)


def _everywhere(tree: Any, layout: Layout | None) -> Any:
    return tree if layout is None else jax.tree.map(layout.constrain, tree)


def start(
    graph: Any,
    weights: Any,
    hidden: Float[Array, "B D"],
    lengths: Int[Array, "B"],
    ends: Ends,
    sampling: SamplingArrays,
    history: History,
    mode: SamplingMode,
) -> tuple[DecodeState, Choice]:
    """Chooses the first token of every sequence from the hidden state of its last prompt token."""
    model: Transformer = nnx.merge(graph, weights)
    zeros = jnp.zeros_like(lengths)
    state = DecodeState(zeros, lengths, zeros, ends.limit > 0, history)
    state, choice = _take(_logits(model, hidden), state, ends, sampling, mode)
    return _in_rows(state, model.layout), _everywhere(choice, model.layout)


def _logits(model: Transformer, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Logits to choose from. On a mesh every device gets all those of its own sequences, 512 kB each."""
    return _in_rows(model.logits(hidden), model.layout)


def _take(
    logits: Float[Array, "B V"], state: DecodeState, ends: Ends, sampling: SamplingArrays, mode: SamplingMode
) -> tuple[DecodeState, Choice]:
    choice = choose(logits, sampling, state.history, state.produced, mode)
    produced = state.produced + state.active
    stopped = (choice.tokens[:, None] == ends.stop_ids).any(axis=1)
    history = record(state.history, choice.tokens, state.active, mode)
    active = state.active & ~stopped & (produced < ends.limit)
    return DecodeState(choice.tokens, state.lengths, produced, active, history), choice


def decode(
    graph: Any,
    weights: Any,
    cache: PagedCache,
    state: DecodeState,
    page_tables: tuple[Int[Array, "B pages"], ...],
    ends: Ends,
    sampling: SamplingArrays,
    n_steps: Int[Array, ""],
    mode: SamplingMode,
) -> tuple[PagedCache, DecodeState, Produced]:
    """Up to `n_steps` decode steps, fewer if every sequence ends. `n_steps` is data: any number runs one program."""
    model: Transformer = nnx.merge(graph, weights)
    B = state.tokens.shape[0]
    top = mode.top_logprobs or 0
    shards = data_shards(model.layout)
    rows = jnp.tile(jnp.arange(B // shards + 1, dtype=jnp.int32), shards)
    empty = Produced(
        Choice(
            jnp.zeros((MAX_STEPS, B), jnp.int32),
            jnp.zeros((MAX_STEPS, B)),
            jnp.zeros((MAX_STEPS, B, top), jnp.int32),
            jnp.zeros((MAX_STEPS, B, top)),
        ),
        jnp.zeros((MAX_STEPS, B), bool),
        jnp.zeros((), jnp.int32),
    )

    def unfinished(carry: tuple[PagedCache, DecodeState, Produced]) -> Array:
        _, state, produced = carry
        return (produced.n_steps < jnp.minimum(n_steps, MAX_STEPS)) & state.active.any()

    def step(carry: tuple[PagedCache, DecodeState, Produced]) -> tuple[PagedCache, DecodeState, Produced]:
        cache, state, produced = carry
        # An ended sequence has length 0 here: its one query row then counts as padding, neither read nor written.
        lengths = jnp.where(state.active, state.lengths + 1, 0)
        hidden, cache = model.extend(state.tokens, cache, PagedBatch(page_tables, rows, lengths))
        was_active = state.active
        state = state._replace(lengths=state.lengths + was_active)
        state, choice = _take(_logits(model, hidden), state, ends, sampling, mode)
        i = produced.n_steps
        state, (choice, was_active) = _in_rows(state, model.layout), _everywhere((choice, was_active), model.layout)
        choices = jax.tree.map(lambda all_steps, one: all_steps.at[i].set(one), produced.choices, choice)
        return cache, state, Produced(choices, produced.active.at[i].set(was_active), i + 1)

    return jax.lax.while_loop(unfinished, step, (cache, state, empty))
