"""Cross-entropy over a large vocabulary that never holds the logits of more than a chunk of tokens.

The gradient of the hidden states is computed beside the loss, while a chunk's logits are there: it is as large as the
hidden states and the backward pass begins with it, so keeping it costs nothing, where computing the logits again would
be 2 T V D operations, half of what the head takes with frozen weights. The same goes for the head's own gradient, which
is made only if the head is trained.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ministral_jax.sharding.layout import Layout

# Of float32 logits on one device. A chunk of 1024 tokens at 131k words: fewer would read the head more often than a
# matrix product of that size takes.
LOGIT_BYTES = 512 * 2**20


def cross_entropy(
    hidden: Float[Array, "*T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*T"],
    weights: Float[Array, "*T"],
    *,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`sum of weights * (logsumexp(logits) - logits[target])` and the sum of weights, both float32.

    Logits are `hidden @ head.T` in float32. Differentiable in `hidden` and `head`, once; the weights are constants.
    `chunk` is the tokens of a device whose logits are held at a time, by default what LOGIT_BYTES has room for. With
    `layout`, hidden states are [B, T, D]: each device takes its own tokens and its own part of the vocabulary.
    """
    weights = weights.astype(jnp.float32)
    return _loss(hidden, head, targets, weights, chunk, layout, False), weights.sum()


def row_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int | None = None,
    layout: Layout | None = None,
) -> Float[Array, "B"]:
    """`sum over T of weights * log softmax(logits)[target]` of each row, float32: the log-probability of an answer.

    As `cross_entropy`, but differentiable in `hidden` alone: where rows count differently, a gradient of the head would
    have to be kept for each. Raises ValueError where one is asked for.
    """
    losses: Array = _loss(hidden, head, targets, weights.astype(jnp.float32), chunk, layout, True)  # pyright: ignore[reportAssignmentType]
    return -losses


class _Parts(NamedTuple):
    """The loss of all tokens or of each row, and its gradients where they were asked for."""

    loss: Array
    d_hidden: Array | None
    d_head: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(
    hidden: Array, head: Array, targets: Array, weights: Array, chunk: int | None, layout: Layout | None, by_row: bool
) -> Array:
    return _parts(hidden, head, targets, weights, chunk, layout, by_row, (False, False)).loss


def _forward(
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    chunk: int | None,
    layout: Layout | None,
    by_row: bool,
) -> tuple[Array, tuple[Array | None, Array | None]]:
    trained = (hidden.perturbed, head.perturbed)
    if by_row and head.perturbed:
        raise ValueError("row_log_probs: differentiated in head, expected a frozen one")
    parts = _parts(hidden.value, head.value, targets.value, weights.value, chunk, layout, by_row, trained)
    return parts.loss, (parts.d_hidden, parts.d_head)


def _backward(
    chunk: int | None,
    layout: Layout | None,
    by_row: bool,
    gradients: tuple[Array | None, Array | None],
    scale: Array | SymbolicZero,
) -> tuple[Any, Any, None, None]:
    del chunk, layout
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    scale = scale[:, None, None] if by_row else scale  # of each row's hidden states [B, T, D]
    d_hidden, d_head = (None if part is None else (part * scale).astype(part.dtype) for part in gradients)
    return d_hidden, d_head, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _parts(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    chunk: int | None,
    layout: Layout | None,
    by_row: bool,
    trained: tuple[bool, bool],
) -> _Parts:
    if layout is None:
        return _local(hidden, head, targets, weights, chunk=chunk, by_row=by_row, trained=trained)
    tokens, vocab = layout.spec(("batch", "sequence")), layout.along("vocab")
    summed = layout.along("batch") + layout.along("sequence")
    of_one_loss = layout.along("sequence") if by_row else summed
    scattered = layout.along("embed") if set(layout.along("embed")) <= set(summed) else ()

    def local(*arrays: Array) -> _Parts:
        parts = _local(*arrays, chunk=chunk, by_row=by_row, trained=trained, vocab=vocab)
        loss = lax.psum(parts.loss, of_one_loss) if of_one_loss else parts.loss
        return _Parts(loss, parts.d_hidden, _reduced(parts.d_head, summed, scattered))

    losses = layout.spec(("batch",)) if by_row else PartitionSpec()
    d_head = PartitionSpec(vocab or None, scattered or None)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tokens, layout.spec(("vocab", None)), tokens, tokens),
        out_specs=_Parts(losses, tokens if trained[0] else None, d_head if trained[1] else None),  # pyright: ignore[reportArgumentType]
        check_vma=False,
    )(hidden, head, targets, weights)


def _reduced(d_head: Array | None, summed: tuple[str, ...], scattered: tuple[str, ...]) -> Array | None:
    """The head's gradient over all tokens, each device left with the columns that it keeps of the head."""
    if d_head is None:
        return None
    if scattered:
        d_head = lax.psum_scatter(d_head, scattered, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in summed if axis not in scattered)
    return lax.psum(d_head, rest) if rest else d_head


def _local(
    hidden: Float[Array, "*T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*T"],
    weights: Float[Array, "*T"],
    *,
    chunk: int | None,
    by_row: bool,
    trained: tuple[bool, bool],
    vocab: tuple[str, ...] = (),
) -> _Parts:
    """One device's tokens against its rows of the head; `vocab` are the mesh axes that split the vocabulary."""
    n_tokens, width = targets.size, hidden.shape[-1]
    n_chunks = math.ceil(n_tokens / (chunk or max(1, LOGIT_BYTES // (4 * head.shape[0]))))
    size = math.ceil(n_tokens / n_chunks)
    fill = n_chunks * size - n_tokens

    def chunked(x: Array, *rest: int) -> Array:
        flat = x.reshape(n_tokens, *rest)
        return jnp.pad(flat, [(0, fill)] + [(0, 0)] * len(rest)).reshape(n_chunks, size, *rest)

    def add(d_head: Array | None, part: tuple[Array, Array, Array]) -> tuple[Array | None, tuple[Array, Array | None]]:
        found = _chunk(part[0], head, part[1], part[2], trained, vocab)
        return jax.tree.map(jnp.add, d_head, found.d_head), (found.loss, found.d_hidden)

    start = jnp.zeros(head.shape, jnp.float32) if trained[1] else None
    d_head, (losses, d_hidden) = lax.scan(add, start, (chunked(hidden, width), chunked(targets), chunked(weights)))
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(n_chunks * size, width)[:n_tokens].reshape(hidden.shape)
    losses = losses.reshape(n_chunks * size)[:n_tokens].reshape(targets.shape)
    loss = losses.sum(axis=-1) if by_row else losses.sum()
    return _Parts(loss, d_hidden, None if d_head is None else d_head.astype(head.dtype))


def _chunk(
    x: Float[Array, "C D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "C"],
    weights: Float[Array, "C"],
    trained: tuple[bool, bool],
    vocab: tuple[str, ...],
) -> _Parts:
    """Losses [C] and gradients of a few tokens; sums over the vocabulary go over the devices that share it."""
    first = lax.axis_index(vocab) * head.shape[0] if vocab else 0

    def total(part: Array) -> Array:
        return lax.psum(part, vocab) if vocab else part

    logits = _product("CD,VD->CV", x, head)
    largest = logits.max(axis=1)  # [C]
    largest = lax.pmax(largest, vocab) if vocab else largest
    norm = largest + jnp.log(total(jnp.exp(logits - largest[:, None]).sum(axis=1)))  # [C], of all the vocabulary
    is_target = jnp.arange(head.shape[0])[None, :] == (targets - first)[:, None]  # [C, V]
    found = total(jnp.where(is_target, logits, 0.0).sum(axis=1))  # [C]
    loss = weights * (norm - found)  # [C]
    d_logits = ((jnp.exp(logits - norm[:, None]) - is_target) * weights[:, None]).astype(x.dtype)  # [C, V]
    d_hidden = total(_product("CV,VD->CD", d_logits, head)).astype(x.dtype) if trained[0] else None
    return _Parts(loss, d_hidden, _product("CV,CD->VD", d_logits, x) if trained[1] else None)


def _product(equation: str, one: Array, other: Array) -> Array:
    return jnp.einsum(equation, one, other, preferred_element_type=jnp.float32)
