"""The Hopper kernels, interpreted on the CPU with race detection, against the dense definition."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reference import flash_attention_reference

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: lengths, heads, widths, window, position of the first query, lengths of packed segments."""

    T: int
    S: int
    N: int = 2
    K: int = 1
    H: int = 64
    Hv: int = 64
    window: int | None = None
    offset: int = 0
    segments: tuple[int, ...] | None = None
    dtype: Any = jnp.bfloat16
    scale: float = 0.125

    def arrays(self) -> tuple[jax.Array, ...]:
        """q, k, v, and gradients of both results."""
        rng = np.random.default_rng(0)
        shapes = (
            (self.T, self.N, self.H),
            (self.S, self.K, self.H),
            (self.S, self.K, self.Hv),
            (self.T, self.N, self.Hv),
        )
        q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, *shape)), self.dtype) for shape in shapes)
        return q, k, v, d_out, jnp.asarray(rng.normal(size=(1, self.T, self.N)), jnp.float32)

    def settings(self) -> dict[str, Any]:
        ids = None
        if self.segments is not None:
            ids = jnp.asarray(np.repeat(np.arange(len(self.segments)), self.segments)[None], jnp.int32)
        queries = None if ids is None else ids[:, self.offset : self.offset + self.T]
        return {
            "window": self.window,
            "query_segments": queries,
            "key_segments": ids,
            "query_offset": self.offset,
            "scale": self.scale,
        }


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def relative_error(got: jax.Array, want: jax.Array) -> float:
    difference = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
    return float(difference / jnp.maximum(jnp.abs(want.astype(jnp.float32)).max(), 1e-6))


def naive(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The definition computed as a careless program would: scores and weights rounded to the dtype of the inputs."""
    settings = case.settings()
    group = case.N // case.K
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    position = case.offset + jnp.arange(case.T)[:, None]
    distance = position - jnp.arange(case.S)[None]
    seen = (distance >= 0) & (distance < (case.window or case.S + case.T))
    if settings["key_segments"] is not None:
        seen &= settings["query_segments"][0][:, None] == settings["key_segments"][0][None]
    scores = jnp.where(seen, jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.asarray(case.scale, case.dtype), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(jnp.isfinite(scores), weights, 0).astype(case.dtype), v)


def check(case: Case) -> None:
    """Both results and all gradients equal the float32 definition within twice the rounding of the dtype, no race."""
    from pallas_kernels.gpu.flash import flash_attention_gpu

    q, k, v, d_out, d_lse = case.arrays()
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    (out, lse), pull = jax.vjp(lambda *a: flash_attention_reference(*a, **case.settings()), *wide[:3])
    d_lse = jnp.where(jnp.isfinite(lse), d_lse, 0.0)
    wanted = pull((wide[3], d_lse))
    (got_out, got_lse), pull = jax.vjp(lambda *a: flash_attention_gpu(*a, **case.settings(), interpret=True), q, k, v)
    got = pull((d_out, d_lse))
    assert not races_found()
    assert got_out.dtype == case.dtype
    np.testing.assert_array_equal(jnp.isfinite(got_lse), jnp.isfinite(lse))
    finite = jnp.isfinite(lse)
    np.testing.assert_allclose(jnp.where(finite, got_lse, 0), jnp.where(finite, lse, 0), atol=3e-5)
    assert not got_out[jnp.broadcast_to(~finite[..., None], got_out.shape)].any()
    seen_rows = finite.all(axis=(0, 2))
    careless = relative_error(naive(case, q, k, v)[:, seen_rows], out[:, seen_rows])
    assert relative_error(got_out, out) <= 2 * careless + 1e-6
    for name, a, b in zip(("dq", "dk", "dv"), got, wanted, strict=True):
        assert a.dtype == case.dtype
        assert relative_error(a, b) < 0.01, name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(200, 200, N=4, K=2, window=100), id="ragged lengths and a window that ends within a block"),
        pytest.param(Case(256, 256, window=128), id="window edge on a block border"),
        pytest.param(Case(77, 77, N=2, K=2, window=1), id="window of one key"),
        pytest.param(Case(130, 130, window=5000, dtype=jnp.float16), id="window longer than the sequence, float16"),
        pytest.param(Case(100, 300, N=16, K=1, window=60, offset=200), id="sixteen heads share a key head, offset"),
        pytest.param(Case(150, 90, offset=-20), id="queries before the first key and after the last"),
        pytest.param(Case(300, 300, segments=(50, 20, 110, 120), window=80), id="packed segments within a window"),
        pytest.param(Case(140, 140, H=192, Hv=128, window=100), id="values narrower than keys"),
        pytest.param(Case(140, 140, H=80, Hv=80, scale=-0.2), id="a width that is padded, a negative scale"),
    ],
)
def test_results_and_gradients_equal_the_definition_without_a_race(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 128, 192, 256])
def test_every_head_width_equals_the_definition(width: int) -> None:
    check(Case(200, 200, N=2, K=1, H=width, Hv=width, window=90, scale=width**-0.5))


def test_an_offset_known_only_when_the_call_runs_gives_the_same() -> None:
    from pallas_kernels.gpu.flash import flash_attention_gpu

    case = Case(64, 192, window=50, offset=128)
    q, k, v, *_ = case.arrays()
    settings = case.settings()
    wanted, _ = flash_attention_reference(q, k, v, **settings)
    got, _ = jax.jit(
        lambda offset: flash_attention_gpu(q, k, v, **(settings | {"query_offset": offset}), interpret=True)
    )(jnp.int32(128))
    assert relative_error(got, wanted) < 0.01


def test_segment_ids_that_return_after_another_are_right_too() -> None:
    from pallas_kernels.gpu.flash import flash_attention_gpu

    case = Case(96, 96, window=50)
    q, k, v, *_ = case.arrays()
    ids = jnp.asarray(np.repeat([3, 1, 3, 2], 24)[None], jnp.int32)
    settings = case.settings() | {"query_segments": ids, "key_segments": ids}
    wanted, _ = flash_attention_reference(q, k, v, **settings)
    got, _ = flash_attention_gpu(q, k, v, **settings, interpret=True)
    assert relative_error(got, wanted) < 0.01


def visited(case: Case, kernel: str) -> np.ndarray:
    """[tiles, blocks]: whether a tile's result turns NaN when one block of the other side is poisoned.

    A block that is loaded and multiplied spreads its NaN even where every weight is 0; a block that is skipped cannot.
    Poisoned block b is batch entry b, so one call finds all visits.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import flash_backward_key, flash_backward_query, flash_forward
    from pallas_kernels.gpu.extent import Extent
    from pallas_kernels.gpu.tiles import TILE

    q, k, v, d_out, _ = case.arrays()
    block, rows = 64, case.T if kernel == "dk, dv" else case.S
    common = {"extent": Extent(case.window, case.T, case.S), "scale": case.scale, "block": block, "stages": 2}
    common["interpret"] = plgpu.InterpretGPUParams()
    blocks = rows // block
    poison = jnp.where(jnp.arange(rows)[None] // block == jnp.arange(blocks)[:, None], jnp.nan, 1.0)[..., None, None]
    q, k, v, d_out = (jnp.repeat(x, blocks, axis=0) for x in (q, k, v, d_out))
    offset = jnp.asarray([case.offset], jnp.int32)
    ones = jnp.ones((blocks, case.N, case.T), jnp.float32)
    if kernel == "forward":
        result, _ = flash_forward.flash_forward(
            flash_forward.Operands(q, k, (v * poison).astype(v.dtype), offset, None), **common
        )
    elif kernel == "dq":
        operands = flash_backward_query.Operands(
            q, (k * poison).astype(k.dtype), v, d_out, 30 * ones, ones, offset, None
        )
        result = flash_backward_query.flash_backward_query(operands, **common)
    else:
        operands = flash_backward_query.Operands(
            q, k, v, (d_out * poison).astype(d_out.dtype), 30 * ones, ones, offset, None
        )
        _, result = flash_backward_key.flash_backward_key(operands, **common)
    turned = jnp.isnan(result).reshape(blocks, -1, TILE, *result.shape[2:]).any(axis=(2, 3, 4))
    return np.asarray(turned.T)


def visible_blocks(case: Case, kernel: str) -> np.ndarray:
    """[tiles, blocks] that hold any visible pair, from the definition of visibility alone."""
    distance = case.offset + np.arange(case.T)[:, None] - np.arange(case.S)[None]
    seen = (distance >= 0) & (distance < (case.window or case.S + case.T))
    if kernel == "dk, dv":
        seen = seen.T
    return seen.reshape(seen.shape[0] // 128, 128, seen.shape[1] // 64, 64).any(axis=(1, 3))


@pytest.mark.parametrize("kernel", ["forward", "dq", "dk, dv"])
@pytest.mark.parametrize(
    "case", [Case(384, 384, N=1, window=100), Case(256, 384, N=1, window=None, offset=128)], ids=str
)
def test_exactly_the_blocks_that_hold_a_visible_pair_are_visited(case: Case, kernel: str) -> None:
    np.testing.assert_array_equal(visited(case, kernel), visible_blocks(case, kernel))


@contextlib.contextmanager
def without_waiting_for(barrier: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plants a pipeline bug: consumers of the forward kernel use a buffer without waiting until it is full."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import flash_forward

    wait = plgpu.barrier_wait
    fields = flash_forward.Shared._fields
    held: dict[str, Any] = {}
    original = flash_forward._attend

    def attend(consumer: Any) -> Any:
        held["ref"] = consumer.shared[fields.index(barrier)]
        return original(consumer)

    def skipping(ref: Any, *args: Any, **kwargs: Any) -> None:
        base = getattr(ref, "ref", ref)
        if held.get("ref") is not None and base is getattr(held["ref"], "ref", held["ref"]):
            return
        wait(ref, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(flash_forward, "_attend", attend)
        patch.setattr(plgpu, "barrier_wait", skipping)
        yield


@pytest.mark.parametrize("barrier", ["k_full", "v_full"])
def test_a_missing_wait_is_caught(barrier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(128, 128, N=1, window=100)
    with (
        without_waiting_for(barrier, monkeypatch),
        pytest.raises((AssertionError, Exception), match=r"assert|[Rr]ace|Barrier|barrier|Mismatch"),
    ):
        check(case)


def test_float32_is_refused_in_one_line() -> None:
    from pallas_kernels.gpu.flash import flash_attention_gpu

    case = Case(8, 8, dtype=jnp.float32)
    q, k, v, *_ = case.arrays()
    with pytest.raises(ValueError, match=r"float32: the Hopper kernels take bfloat16 or float16") as caught:
        flash_attention_gpu(q, k, v, **case.settings(), interpret=True)
    assert "\n" not in str(caught.value)
