"""The TPU kernels, interpreted on CPU: results and gradients against the definition, tiles against a mask."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import visibility
from pallas_kernels.reference import flash_attention_reference
from pallas_kernels.tpu import block_bounds, flash_backward, flash_forward, launch, tiles
from pallas_kernels.tpu.block_sizes import BlockSizes, KernelBlocks
from pallas_kernels.tpu.flash import flash_attention_tpu

from .naive_attention import naive_flash
from .race_records import of_tpu_kernels

QUERY_BLOCK, KEY_BLOCK, KEY_TILE = 16, 16, 8
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # most of this file's time is compiling


def blocks(group: int, lanes: int = 8) -> KernelBlocks:
    """Blocks so small that short sequences have many of them, some cut off."""
    sizes = BlockSizes(QUERY_BLOCK * group, KEY_BLOCK, KEY_TILE, lanes)
    return KernelBlocks(sizes, sizes, sizes)


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; `offset` is the position of the first query among the keys."""

    n_queries: int
    n_keys: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    window: int | None
    segmented: bool
    offset: int
    traced: bool  # whether the offset is known only when the program runs
    lanes: int = QUERY_BLOCK

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(repr(self).encode()))

    def arrays(self, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
        rng = self.rng
        q = rng.standard_normal((2, self.n_queries, self.kv_heads * self.group, self.head_dim))
        k = rng.standard_normal((2, self.n_keys, self.kv_heads, self.head_dim))
        v = rng.standard_normal((2, self.n_keys, self.kv_heads, self.value_dim))
        return tuple(x.astype(np.float32).astype(dtype) for x in (q, k, v))

    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        rng = self.rng
        rows = (2, self.n_queries, self.kv_heads * self.group)
        return rng.standard_normal((*rows, self.value_dim)).astype(np.float32), rng.standard_normal(rows).astype("f4")

    def segments(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids that rise along the keys; a query has the id of the key at its own position."""
        if not self.segmented:
            return None
        of_keys = np.sort(self.rng.integers(0, 4, (2, self.n_keys)), axis=1).astype(np.int32)
        at = np.clip(self.offset + np.arange(self.n_queries), 0, self.n_keys - 1)
        return of_keys[:, at], of_keys


def case(**changes: Any) -> Case:
    plain = {"n_queries": 40, "n_keys": 40, "kv_heads": 1, "group": 2, "head_dim": 8, "value_dim": 8}
    options = {"window": None, "segmented": False, "offset": 0, "traced": False}
    return Case(**{**plain, **options, **changes})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    same = draw(st.booleans())
    n_keys = draw(st.sampled_from([5, 24, 41]))
    return Case(
        n_queries=n_keys if same else draw(st.sampled_from([3, 16, 33])),
        n_keys=n_keys,
        kv_heads=draw(st.sampled_from([1, 2])),
        group=draw(st.sampled_from([1, 2, 3, 4])),
        head_dim=draw(st.sampled_from([4, 8])),
        value_dim=draw(st.sampled_from([4, 8])),
        window=draw(st.sampled_from([None, 1, 3, KEY_TILE, 13, KEY_BLOCK, KEY_BLOCK + 1, 100])),
        segmented=draw(st.booleans()),
        offset=0 if same else draw(st.integers(-4, 50)),
        traced=draw(st.booleans()),
    )


def call(case: Case, run: Callable[..., Any], offset: Any, q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp."""
    segments = case.segments() or (None, None)
    return run(
        q,
        k,
        v,
        window=case.window,
        query_segments=None if segments[0] is None else jnp.asarray(segments[0]),
        key_segments=None if segments[1] is None else jnp.asarray(segments[1]),
        query_offset=offset if case.traced else case.offset,
        scale=case.head_dim**-0.5,
    )


def results(case: Case, run: Callable[..., Any], *arrays: Any) -> tuple[np.ndarray, ...]:
    """Output, log-sum-exp and the gradients of q, k and v through both; rows that see nothing take no part."""
    toward_out, toward_lse = case.cotangents()

    def loss(q: Any, k: Any, v: Any, offset: Any) -> Any:
        out, lse = call(case, run, offset, q, k, v)
        reached = jnp.where(jnp.isfinite(lse), lse, 0) * toward_lse
        return (out * toward_out).astype(jnp.float32).sum() + reached.sum(), (out, lse)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    (_, (out, lse)), gradients = step(*arrays, np.int32(case.offset))
    return tuple(np.asarray(x, np.float32) for x in (out, lse, *gradients))


def kernels(case: Case, interpret: Any = True) -> Callable[..., Any]:
    return functools.partial(flash_attention_tpu, interpret=interpret, block_sizes=blocks(case.group, case.lanes))


@settings(max_examples=2)
@given(case=cases())
@example(case=case(window=1, lanes=8, head_dim=96, value_dim=96))
@example(
    case=case(window=KEY_BLOCK, group=4, n_queries=33, n_keys=64, offset=31, traced=True, head_dim=192, value_dim=128)
)
@example(case=case(window=10, group=16, segmented=True, n_queries=20, n_keys=20))
@example(case=case(window=100, offset=-5, n_queries=37, n_keys=20, segmented=True))
def test_results_and_gradients_equal_those_of_the_definition(case: Case) -> None:
    check_against_the_definition(case)


@pytest.mark.slow
@settings(max_examples=30)
@given(case=cases())
def test_results_and_gradients_equal_those_of_the_definition_in_many_more_cases(case: Case) -> None:
    check_against_the_definition(case)


def check_against_the_definition(case: Case) -> None:
    arrays = case.arrays()
    got = results(case, kernels(case), *arrays)
    expected = naive_flash(*arrays, window=case.window, segments=case.segments(), offset=case.offset)
    for have, want in zip(got[:2], expected, strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)
    for have, want in zip(got[2:], results(case, flash_attention_reference, *arrays)[2:], strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * max(float(np.abs(want).max()), 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 192, 256])
def test_every_head_width_equals_the_definition(width: int) -> None:
    """Widths 96 and 192/128 are among the examples above."""
    shape = case(n_queries=20, n_keys=20, head_dim=width, value_dim=width, window=11)
    arrays = shape.arrays()
    got, wanted = results(shape, kernels(shape), *arrays), results(shape, flash_attention_reference, *arrays)
    for have, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5 * max(float(np.abs(want).max()), 1.0))


def plain_bfloat16(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, scale: float, **_: Any) -> Any:
    """Dense attention as a model in bfloat16 writes it: products in bfloat16, softmax in float32."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    scores = (jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale).astype(jnp.float32)
    scores = jnp.where((distance >= 0) & (distance < window), scores, -jnp.inf)
    out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1).astype(q.dtype), v)
    return out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)


def test_bfloat16_loses_at_most_twice_what_plain_bfloat16_attention_loses() -> None:
    shape = case(n_queries=70, n_keys=70, head_dim=32, value_dim=32, window=25)
    arrays = shape.arrays(jnp.bfloat16)
    truth = results(shape, flash_attention_reference, *(x.astype(np.float32) for x in arrays))
    plain, ours = results(shape, plain_bfloat16, *arrays), results(shape, kernels(shape), *arrays)
    for exact, rough, got in zip(truth, plain, ours, strict=True):
        assert np.abs(got - exact).max() <= 2 * np.abs(rough - exact).max()


def dense_mask(case: Case) -> np.ndarray:
    """[T, S], written out."""
    at, key = case.offset + np.arange(case.n_queries)[:, None], np.arange(case.n_keys)[None, :]
    return (key <= at) & (True if case.window is None else key > at - case.window)


def nonempty(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which blocks of a mask hold anything."""
    padded = np.pad(mask, ((0, -mask.shape[0] % rows), (0, -mask.shape[1] % columns)))
    return padded.reshape(-1 if mask.size else 0, rows, padded.shape[1] // columns, columns).any(axis=(1, 3))


@pytest.mark.parametrize(
    "shape",
    [
        case(n_queries=72, n_keys=72, window=KEY_BLOCK),
        case(n_queries=30, n_keys=80, window=21, offset=47, traced=True),
        case(n_queries=50, n_keys=50),
    ],
)
def test_only_tiles_in_sight_are_computed_and_only_edge_tiles_masked(
    shape: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted while the kernels run: each tile with anything visible once, per kernel, batch and key head."""
    counts: Counter[tuple[str, bool]] = Counter()
    real = tiles.for_each_tile

    def counting(kernel: str) -> Callable[..., None]:
        def for_each_tile(*args: Any) -> None:
            def compute(tile: Any, masked: bool) -> None:
                jax.debug.callback(lambda: counts.update([(kernel, masked)]))
                args[-1](tile, masked)

            real(*args[:-1], compute)

        return for_each_tile

    monkeypatch.setattr(flash_forward, "for_each_tile", counting("forward"))
    monkeypatch.setattr(flash_backward, "for_each_tile", counting("backward"))
    results(shape, kernels(shape), *shape.arrays())
    jax.effects_barrier()
    mask = dense_mask(shape)
    visible = nonempty(mask, QUERY_BLOCK, KEY_TILE)
    # Rows past the end of the queries need no mask, keys past the end do.
    rows = np.pad(mask, ((0, -mask.shape[0] % QUERY_BLOCK), (0, 0)), constant_values=True)
    bare = visible & ~nonempty(~np.pad(rows, ((0, 0), (0, -mask.shape[1] % KEY_TILE))), QUERY_BLOCK, KEY_TILE)
    assert counts["forward", True] + counts["forward", False] == 2 * visible.sum()
    assert counts["forward", False] == 2 * bare.sum() > 0
    assert counts["backward", True] == 2 * counts["forward", True]  # dq and dkv
    assert counts["backward", False] == 2 * counts["forward", False]


@settings(max_examples=40)
@given(
    lengths=st.sampled_from([(1, 1), (40, 40), (90, 33), (17, 80)]),
    window=st.sampled_from([None, 1, 7, 16, 17, 40, 200]),
    offset=st.integers(-20, 100),
)
def test_ranges_hold_the_visible_blocks_and_the_steps_are_enough(
    lengths: tuple[int, int], window: int | None, offset: int
) -> None:
    extent = block_bounds.Extent(*lengths, window, offset, 8, 16)
    shape = case(n_queries=lengths[0], n_keys=lengths[1], window=window, offset=offset)
    blocks_seen = nonempty(dense_mask(shape), 8, 16)
    for ranges, steps, seen in (
        (block_bounds.key_ranges, block_bounds.key_steps, blocks_seen),
        (block_bounds.query_ranges, block_bounds.query_steps, blocks_seen.T),
    ):
        start, stop = (np.asarray(x) for x in ranges(extent, offset, None))
        np.testing.assert_array_equal(stop - start, seen.sum(axis=1))
        at = np.arange(seen.shape[1])
        np.testing.assert_array_equal((at >= start[:, None]) & (at < stop[:, None]), seen)
        assert steps(extent) == max(1, seen.sum(axis=1).max())
        assert steps(extent._replace(offset=None)) >= steps(extent)


def test_surplus_steps_load_nothing_new() -> None:
    scalars = tiles.Scalars(jnp.zeros(1, jnp.int32), jnp.asarray([2, 0]), jnp.asarray([4, 0]))
    assert [int(tiles.visited_block(scalars, jnp.int32(0), jnp.int32(s))) for s in range(4)] == [2, 3, 3, 3]
    assert int(tiles.visited_block(scalars, jnp.int32(1), jnp.int32(3))) == 0


def test_key_blocks_of_foreign_segments_are_not_visited() -> None:
    extent = block_bounds.Extent(64, 64, None, 0, 16, 16)
    ids = jnp.asarray(np.repeat([[0, 1, 1, 2], [0, 0, 0, 0]], 16, axis=1), jnp.int32)
    of_blocks = block_bounds.segment_ranges(ids, 16)
    start, stop = block_bounds.key_ranges(extent, 0, block_bounds.segment_overlap(of_blocks, of_blocks, 2))
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [
        *[(0, 1), (1, 2), (1, 3), (3, 4)],
        *[(0, 1), (0, 2), (0, 3), (0, 4)],
    ]


RACE_CASE = case(n_queries=32, n_keys=32, window=12)


def test_no_kernel_races_with_its_own_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    detectors = of_tpu_kernels(monkeypatch)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    got = results(RACE_CASE, kernels(RACE_CASE, interpret), *RACE_CASE.arrays())
    assert len(detectors) == 3  # forward; dq; dk and dv
    assert not detectors.races_found
    for have, want in zip(got, results(RACE_CASE, flash_attention_reference, *RACE_CASE.arrays()), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_two_cores_that_write_one_block_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: an index map that forgets the batch, whose sequences run on different cores."""

    def forgetful(self: launch.BlockSpecs, width: int) -> pl.BlockSpec:
        shape = (None, None, self.call.groups, self.call.extent.query_block, width)
        return self._spec(shape, lambda b, h, i, j: (0, h, 0, i, 0))

    monkeypatch.setattr(launch.BlockSpecs, "queries", forgetful)
    detectors = of_tpu_kernels(monkeypatch)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="zero")
    results(RACE_CASE, kernels(RACE_CASE, interpret), *RACE_CASE.arrays())
    forward, dq, _ = detectors
    assert forward.races_found
    assert dq.races_found


def test_a_window_one_key_too_wide_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: `<=` for `<` at the far edge of the window."""

    def too_wide(query: Any, key: Any, window: int) -> Any:
        return visibility.visible(query, key, window + 1)

    monkeypatch.setattr(tiles, "visible", too_wide)
    shape = case(window=KEY_BLOCK)
    out, _ = jax.jit(functools.partial(call, shape, kernels(shape), 0), compiler_options=QUICK)(*shape.arrays())
    assert not np.allclose(out, naive_flash(*shape.arrays(), window=shape.window)[0], atol=2e-3)


def test_blocks_beyond_the_vector_memory_are_refused_before_lowering() -> None:
    sizes = BlockSizes(16384, 4096, 2048)
    q = jax.ShapeDtypeStruct((1, 16384, 8, 256), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 16384, 1, 256), jnp.float32)
    run = functools.partial(flash_attention_tpu, block_sizes=KernelBlocks(sizes, sizes, sizes))
    options = {"window": None, "query_segments": None, "key_segments": None, "query_offset": 0, "scale": 1.0}
    with pytest.raises(ValueError, match=r"block_sizes: forward with .* needs .* MiB of vector memory"):
        jax.eval_shape(lambda q, k, v: run(q, k, v, **options), q, k, k)


def test_block_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="key_block=48 is not a multiple of key_tile=32"):
        BlockSizes(128, 48, 32)
    with pytest.raises(ValueError, match="query_rows=0: expected at least 1"):
        BlockSizes(0, 32, 32)


def test_half_precision_is_refused_by_name() -> None:
    arrays = case().arrays(np.float16)
    with pytest.raises(ValueError, match="q is float16: the TPU kernel takes bfloat16 or float32"):
        call(case(), kernels(case()), 0, *(jnp.asarray(x) for x in arrays))
