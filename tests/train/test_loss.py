"""Cross-entropy in chunks: the value and gradients of the plain formula, without its memory, on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ministral_jax.sharding.layout import Layout
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.sharding.rules import RULES
from train.loss import cross_entropy, row_log_probs

BATCH, LENGTH, WIDTH, VOCAB = 8, 6, 16, 24


def plain(hidden: Any, head: Any, targets: Any, weights: Any) -> jax.Array:
    """The formula, over all logits at once."""
    logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(found * weights).sum()


def arguments(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, head, targets, and weights of which some are zero; logits are wide."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(2 * rng.standard_normal((BATCH, LENGTH, WIDTH)), dtype)
    head = jnp.asarray(2 * rng.standard_normal((VOCAB, WIDTH)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 2, (BATCH, LENGTH)) * rng.integers(0, 2, (BATCH, LENGTH)), jnp.float32)
    return hidden, head, targets, weights


def assert_close(found: Any, expected: Any, close: float) -> None:
    assert found.dtype == expected.dtype
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.abs(found - expected).max() <= close * np.abs(expected).max()


@pytest.mark.parametrize("chunk", [5, 16, None])
def test_value_and_gradients_are_those_of_the_plain_formula(chunk: int | None) -> None:
    """In chunks that do not divide the 48 tokens, too."""
    given = arguments()
    loss = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=chunk)[0], (0, 1)))
    value, gradients = loss(*given)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(*given)
    assert_close(value, expected, 1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, 1e-6)


def test_gradients_agree_with_differences() -> None:
    hidden, head, targets, weights = arguments()
    check_grads(
        lambda h, w: 0.01 * cross_entropy(jnp.asarray(h), jnp.asarray(w), targets, weights, chunk=7)[0],
        (hidden / 4, head / 4), order=1, modes=["rev"], atol=1e-2, rtol=1e-2,
    )  # fmt: skip


def test_the_sum_of_weights_stands_beside_the_loss() -> None:
    given = arguments()
    _, total = cross_entropy(*given)
    assert_close(total, given[3].sum(), 1e-6)


def test_tokens_without_weight_give_no_gradient_whatever_their_target() -> None:
    hidden, head, targets, weights = arguments()
    other = jnp.where(weights == 0, (targets + 1) % VOCAB, targets)
    gradient = jax.grad(lambda hidden, targets: cross_entropy(hidden, head, targets, weights, chunk=7)[0])
    found = np.asarray(gradient(hidden, targets))
    assert not found[np.asarray(weights) == 0].any()
    np.testing.assert_array_equal(found, np.asarray(gradient(hidden, other)))


def test_in_bfloat16_logits_are_float32_and_gradients_as_close_as_their_dtype() -> None:
    given = arguments(jnp.bfloat16)
    value, gradients = jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=16)[0], (0, 1))(*given)
    wide = (given[0].astype(jnp.float32), given[1].astype(jnp.float32), *given[2:])
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(*wide)
    assert_close(value, expected, 1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found.astype(jnp.float32), wanted, 1e-2)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, weights = arguments()
    value, gradient = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, weights)[0])(1e4 * hidden)
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,context=2,tensor=2", "data=2,fsdp=4"])
def test_every_mesh_gives_the_same_and_gathers_no_vocabulary(mesh: str) -> None:
    layout = Layout(make_mesh(mesh), RULES["all"])
    hidden, head, targets, weights = arguments()
    tokens = layout.sharding(("batch", "sequence"))
    placed = (
        jax.device_put(hidden, tokens), jax.device_put(head, layout.sharding(("vocab", "embed"))),
        jax.device_put(targets, tokens), jax.device_put(weights, tokens),
    )  # fmt: skip
    loss = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=4, layout=layout)[0], (0, 1)))
    compiled = loss.lower(*placed).compile()
    value, gradients = compiled(*placed)
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(hidden, head, targets, weights)
    assert_close(value, expected, 1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(found, wanted, 1e-6)
    assert gradients[0].sharding.is_equivalent_to(tokens, 3)
    text = compiled.as_text() or ""
    rows = VOCAB // layout.ways("vocab")
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert all(f"f32[{rows},{WIDTH}]" in line for line in gathered)
    if layout.along("embed"):
        assert gathered


@pytest.mark.parametrize("trained", [(0,), (0, 1)], ids=["frozen head", "trained head"])
def test_131072_words_and_8192_tokens_take_a_tenth_of_the_plain_memory(trained: tuple[int, ...]) -> None:
    """Five times less is asked for. Compiled for 8192 tokens of little width, so that logits are all that counts."""
    shape: Any = jax.ShapeDtypeStruct
    given = (shape((1, 8192, 16), jnp.float32), shape((131072, 16), jnp.float32))
    given += (shape((1, 8192), jnp.int32), shape((1, 8192), jnp.float32))

    def temporary(loss: Any) -> int:
        compiled = jax.jit(jax.value_and_grad(loss, trained)).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(lambda *a: cross_entropy(*a)[0]) * 10 <= temporary(plain)


def plain_rows(hidden: Any, head: Any, targets: Any, weights: Any) -> jax.Array:
    return -jax.vmap(plain, (0, None, 0, 0))(hidden, head, targets, weights)


def counted(rows: jax.Array) -> jax.Array:
    """Something of the rows that lets each count differently."""
    return jnp.sum(jnp.sin(rows) * jnp.arange(1, 1 + len(rows)))


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
def test_rows_have_the_log_probabilities_of_the_plain_formula_and_each_its_own_gradient(mesh: str | None) -> None:
    layout = None if mesh is None else Layout(make_mesh(mesh), RULES["all"])
    given = arguments()

    def ours(hidden: Any) -> jax.Array:
        return row_log_probs(hidden, *given[1:], chunk=5, layout=layout)

    def theirs(hidden: Any) -> jax.Array:
        return plain_rows(hidden, *given[1:])

    assert_close(jax.jit(ours)(given[0]), theirs(given[0]), 1e-6)
    found = jax.jit(jax.grad(lambda hidden: counted(ours(hidden))))(given[0])
    assert_close(found, jax.grad(lambda hidden: counted(theirs(hidden)))(given[0]), 1e-4)


def test_rows_give_no_gradient_of_the_head() -> None:
    hidden, head, targets, weights = arguments()
    with pytest.raises(ValueError, match="differentiated in head"):
        jax.grad(lambda head: row_log_probs(hidden, head, targets, weights).sum())(head)
