"""The Hopper kernels, interpreted on the CPU with race detection, against the dense definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention_gradients
from pallas_kernels.reference import flash_attention_reference

from .race_records import Detectors, of_gpu_kernels

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]


MOST = 0.01  # of the largest value: where a careless program is worse than that, twice its error says little


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


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> Detectors:
    return of_gpu_kernels(monkeypatch)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    difference = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
    return float(difference / jnp.maximum(jnp.abs(want.astype(jnp.float32)).max(), 1e-6))


def naive(case: Case, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The definition computed as a careless program would: scores and weights rounded to the dtype of the inputs."""
    settings = case.settings()
    group = case.N // case.K
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    position = case.offset + jnp.arange(case.T)[:, None]
    distance = position - jnp.arange(case.S)[None]
    seen = (distance >= 0) & (distance < (case.window or case.S + case.T))
    if settings["key_segments"] is not None:
        seen &= settings["query_segments"][0][:, None] == settings["key_segments"][0][None]
    product = jnp.einsum("BTNH,BSNH->BNTS", q, k) * jnp.asarray(case.scale, case.dtype)
    scores = jnp.where(seen, product, -60000.0)  # finite in every dtype, so that rows which see nothing have gradients
    out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1) * seen, v)
    return out, jax.nn.logsumexp(scores.astype(jnp.float32), axis=-1).swapaxes(1, 2)


def gradients(attend: Callable[..., Any], arrays: Sequence[jax.Array], toward: Any) -> dict[str, jax.Array]:
    """Both results and the gradients of q, k, v through both."""
    results, pull = jax.vjp(attend, *arrays)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (*results, *pull(toward)), strict=True))


def check(case: Case, detectors: Detectors) -> None:
    """Results and gradients are off by at most twice what a careless program of that dtype is; no kernel races."""
    from pallas_kernels.gpu.flash import flash_attention_gpu

    q, k, v, d_out, d_lse = case.arrays()
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact_lse = flash_attention_reference(*wide, **case.settings())[1]
    finite = jnp.isfinite(exact_lse)
    d_lse = jnp.where(finite, d_lse, 0.0)
    exact = gradients(
        lambda *a: flash_attention_reference(*a, **case.settings()), wide, (d_out.astype(jnp.float32), d_lse)
    )
    rough = gradients(lambda *a: naive(case, *a), (q, k, v), (d_out, d_lse))
    attend = lambda *a: flash_attention_gpu(*a, **case.settings(), interpret=True)  # noqa: E731
    got = gradients(attend, (q, k, v), (d_out, d_lse))
    assert len(detectors) >= (3 if case.H <= 128 else 4)  # one for each kernel
    assert not detectors.races_found
    np.testing.assert_array_equal(jnp.isfinite(got["lse"]), finite)
    np.testing.assert_allclose(jnp.where(finite, got["lse"], 0), jnp.where(finite, exact_lse, 0), atol=3e-5)
    assert not got["out"][jnp.broadcast_to(~finite[..., None], got["out"].shape)].any()
    for name in ("out", "dq", "dk", "dv"):
        assert got[name].dtype == case.dtype
        rounding = relative_error(exact[name].astype(case.dtype), exact[name])
        allowed = min(2 * relative_error(rough[name], exact[name]) + rounding, MOST)
        assert relative_error(got[name], exact[name]) <= allowed, name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(200, 200, N=4, K=2, window=100), id="ragged lengths and a window that ends within a block"),
        pytest.param(Case(77, 77, N=2, K=2, window=1), id="window of one key"),
        pytest.param(
            Case(100, 100, N=1, H=80, Hv=72, window=5000, scale=-0.2, dtype=jnp.float16),
            id="float16, a window longer than the sequence, widths that are padded, a negative scale",
        ),
        pytest.param(Case(60, 250, N=16, K=1, window=60, offset=190), id="sixteen heads share a key head, offset"),
        pytest.param(Case(150, 90, N=1, offset=-20), id="queries before the first key and after the last"),
        pytest.param(Case(200, 200, N=1, segments=(40, 10, 80, 70), window=60), id="packed segments within a window"),
        pytest.param(
            Case(192, 192, N=1, H=192, Hv=128, window=128), id="narrower values, window edge on a block border"
        ),
    ],
)
def test_results_and_gradients_equal_the_definition_without_a_race(case: Case, detectors: Detectors) -> None:
    check(case, detectors)


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 128, 192, 256])
def test_every_head_width_equals_the_definition(width: int, detectors: Detectors) -> None:
    check(Case(200, 200, N=2, K=1, H=width, Hv=width, window=90, scale=width**-0.5), detectors)


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


@pytest.mark.parametrize("ids", [None, (2, 5, 5), (2, 5, 2)], ids=["no ids", "unbroken ids", "an id that returns"])
def test_gradients_over_halves_of_the_keys_add_up(ids: tuple[int, ...] | None) -> None:
    case = Case(96, 96, N=2, K=1, H=80, Hv=72, scale=-0.2)
    q, k, v, d_out, _ = case.arrays()
    ids_of = None if ids is None else jnp.repeat(jnp.asarray([ids], jnp.int32), 32, axis=1)
    settings = {**case.settings(), "query_segments": ids_of, "key_segments": ids_of}
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda *a: flash_attention_reference(*a, **settings), *wide)
    exact = pull((d_out.astype(jnp.float32), jnp.zeros_like(lse)))
    delta = (d_out.astype(jnp.float32) * out).sum(-1)
    parts = [
        flash_attention_gradients(
            *(q, k[:, half], v[:, half], d_out, lse, delta),
            segment_ids=None if ids_of is None else (ids_of, ids_of[:, half]),
            query_offset=-half.start,
            scale=case.scale,
            implementation="pallas_gpu",
            interpret=True,
        )
        for half in (slice(0, 48), slice(48, 96))
    ]
    (dq_old, *old), (dq_new, *new) = parts
    found = (dq_old.astype(jnp.float32) + dq_new, *(jnp.concatenate(x, 1) for x in zip(old, new, strict=True)))
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) <= MOST


def test_segment_ids_that_return_after_another_are_right_too() -> None:
    from pallas_kernels.gpu.flash import flash_attention_gpu

    case = Case(96, 96, window=50)
    q, k, v, *_ = case.arrays()
    ids = jnp.asarray(np.repeat([3, 1, 3, 2], 24)[None], jnp.int32)
    settings = case.settings() | {"query_segments": ids, "key_segments": ids}
    wanted, _ = flash_attention_reference(q, k, v, **settings)
    got, _ = flash_attention_gpu(q, k, v, **settings, interpret=True)
    assert relative_error(got, wanted) < 0.01


def test_float32_is_refused_in_one_line() -> None:
    from pallas_kernels.gpu.flash import flash_attention_gpu

    case = Case(8, 8, dtype=jnp.float32)
    q, k, v, *_ = case.arrays()
    with pytest.raises(ValueError, match=r"float32: the Hopper kernels take bfloat16 or float16") as caught:
        flash_attention_gpu(q, k, v, **case.settings(), interpret=True)
    assert "\n" not in str(caught.value)
