"""flash_attention: every implementation against the textbook loop, gradients against autodiff of the dense one."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Implementation
from pallas_kernels.xla import flash

from .naive_attention import naive_flash

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla")
QUERY_BLOCK, KEY_BLOCK = 8, 16
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # most of this file's time is compiling
NO_SHRINKING = (Phase.explicit, Phase.generate)  # every smaller example would be compiled anew


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that short sequences have many of them, some cut off."""
    monkeypatch.setattr(flash, "QUERY_BLOCK", QUERY_BLOCK)
    monkeypatch.setattr(flash, "KEY_BLOCK", KEY_BLOCK)


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; `offset` is the position of the first query among the keys."""

    batch: int
    n_queries: int
    n_keys: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    window: int | None
    segmented: bool
    offset: int

    def arrays(self, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(zlib.crc32(repr(self).encode()))
        q = rng.standard_normal((self.batch, self.n_queries, self.kv_heads * self.group, self.head_dim))
        k = rng.standard_normal((self.batch, self.n_keys, self.kv_heads, self.head_dim))
        v = rng.standard_normal((self.batch, self.n_keys, self.kv_heads, self.value_dim))
        return tuple(x.astype(np.float32).astype(dtype) for x in (q, k, v))

    def segments(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids that rise along the keys; a query has the id of the key at its own position."""
        if not self.segmented:
            return None
        rng = np.random.default_rng(self.n_keys)
        of_keys = np.sort(rng.integers(0, 4, (self.batch, self.n_keys)), axis=1).astype(np.int32)
        at = np.clip(self.offset + np.arange(self.n_queries), 0, self.n_keys - 1)
        return of_keys[:, at], of_keys


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_keys = draw(st.integers(1, 50))
    same = draw(st.booleans())
    n_queries = n_keys if same else draw(st.integers(1, 50))
    return Case(
        batch=draw(st.integers(1, 2)),
        n_queries=n_queries,
        n_keys=n_keys,
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 4, 16])),
        head_dim=draw(st.sampled_from([4, 64, 96, 128, 192, 256])),
        value_dim=draw(st.sampled_from([2, 64, 96, 128, 192, 256])),
        window=draw(st.sampled_from([None, 1, 3, QUERY_BLOCK, 13, KEY_BLOCK, KEY_BLOCK + 1, 100])),
        segmented=draw(st.booleans()),
        offset=0 if same else draw(st.integers(-4, 60)),
    )


def call(case: Case, implementation: Implementation, q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp."""
    segments = case.segments()
    return flash_attention(
        q,
        k,
        v,
        window=case.window,
        segment_ids=None if segments is None else (jnp.asarray(segments[0]), jnp.asarray(segments[1])),
        query_offset=case.offset,
        return_lse=True,
        implementation=implementation,
    )


run = jax.jit(call, static_argnums=(0, 1), compiler_options=QUICK)


@settings(max_examples=16, phases=NO_SHRINKING)
@given(case=cases())
def test_every_implementation_equals_the_textbook_loop(case: Case) -> None:
    arrays = case.arrays()
    expected = naive_flash(*arrays, window=case.window, segments=case.segments(), offset=case.offset)
    for implementation in IMPLEMENTATIONS:
        for got, want in zip(run(case, implementation, *arrays), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=implementation)


@settings(max_examples=5, phases=NO_SHRINKING)
@given(case=cases())
def test_gradients_equal_those_of_the_dense_definition(case: Case) -> None:
    """Through the output and the log-sum-exp together; rows that see nothing take no part."""
    rng = np.random.default_rng(0)
    shape = (case.batch, case.n_queries, case.kv_heads * case.group)
    toward_out, toward_lse = rng.standard_normal((*shape, case.value_dim)), rng.standard_normal(shape)

    def loss(implementation: Implementation) -> Any:
        def of(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out, lse = call(case, implementation, q, k, v)
            reached = jnp.isfinite(lse)
            return (out * toward_out).sum() + (jnp.where(reached, lse, 0) * toward_lse).sum()

        return jax.jit(jax.grad(of, argnums=(0, 1, 2)), compiler_options=QUICK)

    arrays = case.arrays()
    for got, want in zip(loss("xla")(*arrays), loss("reference")(*arrays), strict=True):
        scale = max(float(np.abs(want).max()), 1.0)
        np.testing.assert_allclose(got, np.nan_to_num(want), rtol=0, atol=2e-5 * scale)


def plain_bfloat16(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """Dense attention as a model in bfloat16 writes it: products in bfloat16, softmax in float32."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where((distance >= 0) & (distance < window), scores.astype(jnp.float32), -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1).astype(q.dtype), v)


def test_bfloat16_loses_at_most_twice_what_plain_bfloat16_attention_loses() -> None:
    case = Case(2, 70, 70, 1, 4, 32, 32, 25, False, 0)
    arrays = case.arrays(jnp.bfloat16)
    truth, _ = naive_flash(*(x.astype(np.float32) for x in arrays), window=case.window)
    plain = jax.jit(plain_bfloat16, static_argnums=3)(*arrays, 25)
    allowed = 2 * np.abs(np.asarray(plain, np.float32) - truth).max()
    for implementation in IMPLEMENTATIONS:
        out, lse = run(case, implementation, *arrays)
        assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
        assert np.abs(np.asarray(out, np.float32) - truth).max() <= allowed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_are_zero_and_do_not_spoil_gradients(implementation: Implementation) -> None:
    case = Case(1, 20, 20, 1, 2, 4, 4, None, False, -5)
    arrays = case.arrays()
    out, lse = run(case, implementation, *arrays)
    assert np.all(np.asarray(out)[:, :5] == 0)
    assert np.all(np.asarray(lse)[:, :5] == -np.inf)
    assert np.all(np.isfinite(np.asarray(lse)[:, 5:]))
    summed = jax.grad(lambda *x: call(case, implementation, *x)[0].sum(), argnums=(0, 1, 2))
    gradients = jax.jit(summed, compiler_options=QUICK)(*arrays)
    assert all(np.all(np.isfinite(np.asarray(gradient))) for gradient in gradients)


def test_key_blocks_outside_the_window_are_never_touched() -> None:
    """NaN there would survive any mask that multiplies."""
    case = Case(1, 8, 80, 1, 2, 4, 4, 10, False, 70)
    q, k, v = case.arrays()
    whole = run(case, "xla", q, k, v)
    for x in (k, v):
        x[:, : (70 - 9) // KEY_BLOCK * KEY_BLOCK] = np.nan
    for got, want in zip(run(case, "xla", q, k, v), whole, strict=True):
        np.testing.assert_array_equal(got, want)


def test_one_array_of_segment_ids_serves_queries_and_keys() -> None:
    case = Case(2, 30, 30, 1, 2, 4, 4, None, True, 0)
    segments = case.segments()
    assert segments is not None
    arrays = case.arrays()
    one = jax.jit(functools.partial(flash_attention, implementation="xla"))(*arrays, segment_ids=segments[1])
    np.testing.assert_allclose(one, run(case, "xla", *arrays)[0], atol=1e-6)


def test_scale_replaces_the_square_root_of_the_head_width() -> None:
    case = Case(1, 12, 12, 1, 1, 4, 4, None, False, 0)
    arrays = case.arrays()
    expected, _ = naive_flash(*arrays, scale=0.125)
    got = jax.jit(functools.partial(flash_attention, scale=0.125))(*arrays)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(0, 4), (4, 0)])
def test_empty_queries_and_empty_keys_are_served(n_queries: int, n_keys: int) -> None:
    q, k = jnp.ones((1, n_queries, 2, 4)), jnp.ones((1, n_keys, 1, 4))
    out, lse = flash_attention(q, k, k, return_lse=True)
    assert out.shape == (1, n_queries, 2, 4)
    assert np.all(np.asarray(out) == 0)
    assert np.all(np.asarray(lse) == -np.inf)
