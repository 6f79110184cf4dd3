"""paged_attention and write_pages: ragged batches over shuffled pages against the textbook loop, NaN all around."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_attention, write_pages
from pallas_kernels.paged_attention import Implementation, token_slots
from pallas_kernels.xla import paged

from .naive_attention import naive_paged

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla")
MAX_TILE, MIN_KEY_BLOCK = 4, 8
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # most of this file's time is compiling
NO_SHRINKING = (Phase.explicit, Phase.generate)  # every smaller example would be compiled anew


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and key blocks so small that short sequences have many of them."""
    monkeypatch.setattr(paged, "MAX_TILE", MAX_TILE)
    monkeypatch.setattr(paged, "MIN_KEY_BLOCK", MIN_KEY_BLOCK)


class Call(NamedTuple):
    """The array arguments of paged_attention."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_table: np.ndarray
    query_starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Case:
    """A ragged batch: of sequence b the last `counts[b]` of `lengths[b]` tokens are queries; `padding` rows follow."""

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    padding: int
    page: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    window: int | None

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(repr(self).encode()))

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        rng = self.rng()
        return [
            tuple(
                rng.standard_normal((n, self.kv_heads, h)).astype(np.float32) for h in (self.head_dim, self.value_dim)
            )
            for n in self.lengths
        ]

    def call(self) -> Call:
        """Pages in random order; NaN in the null page, in free pages, behind every window and past every length."""
        rng = self.rng()
        pages_of = [-(-n // self.page) for n in self.lengths]
        width, n_pages = max(pages_of) + 1, sum(pages_of) + 3
        free = list(1 + rng.permutation(n_pages - 1))
        pools = [
            np.full((n_pages, self.page, self.kv_heads, h), np.nan, np.float32) for h in (self.head_dim, self.value_dim)
        ]
        table = np.zeros((len(self.lengths), width), np.int32)
        for b, arrays in enumerate(self.sequences()):
            first_seen = self.first_seen(b)
            for position in range(first_seen, self.lengths[b]):
                entry = position // self.page
                table[b, entry] = table[b, entry] or free.pop()
                for pool, array in zip(pools, arrays, strict=True):
                    pool[table[b, entry], position % self.page] = array[position]
        n_rows = sum(self.counts) + self.padding
        q = rng.standard_normal((n_rows, self.kv_heads * self.group, self.head_dim)).astype(np.float32)
        starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        return Call(q, *pools, table, starts, np.asarray(self.lengths, np.int32))

    def first_seen(self, b: int) -> int:
        """Oldest position that a query of sequence b sees; its length where it has no query."""
        if not self.counts[b]:
            return self.lengths[b]
        return 0 if self.window is None else max(self.lengths[b] - self.counts[b] - self.window + 1, 0)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    counts = [min(n, draw(st.sampled_from([0, 1, 1, 3, 9, n]))) for n in lengths]
    padding = draw(st.integers(0 if sum(counts) else 1, 3))
    page = draw(st.sampled_from([1, 4, 16]))
    return Case(
        lengths=tuple(lengths),
        counts=tuple(counts),
        padding=padding,
        page=page,
        kv_heads=draw(st.sampled_from([1, 3])),
        group=draw(st.sampled_from([1, 4, 16])),
        head_dim=draw(st.sampled_from([4, 8])),
        value_dim=draw(st.sampled_from([2, 8])),
        window=draw(st.sampled_from([None, 1, 3, page, MIN_KEY_BLOCK, MIN_KEY_BLOCK + 1, 100])),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def run(window: int | None, implementation: Implementation, call: Call) -> tuple[jax.Array, jax.Array]:
    return paged_attention(*call, window=window, return_lse=True, implementation=implementation)


@settings(max_examples=14, phases=NO_SHRINKING)
@given(case=cases())
def test_every_implementation_equals_the_textbook_loop(case: Case) -> None:
    call = case.call()
    expected = naive_paged(call.q, case.sequences(), list(case.counts), window=case.window)
    for implementation in IMPLEMENTATIONS:
        for got, want in zip(run(case.window, implementation, call), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_table_that_repeats_its_pages_is_a_ring(implementation: Implementation) -> None:
    """Windowed keys in three pages taken in turn give what keys in pages of their own give."""
    plain = Case((22,), (2,), 0, 4, 1, 2, 4, 4, 7)
    call = plain.call()
    keys, values = plain.sequences()[0]
    pools = [np.full((4, 4, 1, 4), np.nan, np.float32) for _ in range(2)]
    for position in range(22):
        for pool, array in zip(pools, (keys, values), strict=True):
            pool[1 + position // 4 % 3, position % 4] = array[position]
    ring = call._replace(
        k_pages=pools[0], v_pages=pools[1], page_table=1 + np.arange(call.page_table.shape[1], dtype=np.int32)[None] % 3
    )
    for got, want in zip(run(7, implementation, ring), run(7, implementation, call), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("counts", [(5, 1, 0), (4, 4, 4), (0, 0, 9), (1, 1, 1), (0, 7, 3), (0, 0, 0)])
def test_every_query_row_lies_in_exactly_one_tile(counts: tuple[int, ...]) -> None:
    """Places of a tile that hold no row point past the end, where nothing is written."""
    n_rows, lengths = 13, np.add(counts, 2).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiles = jitted_tiles(starts, lengths, n_rows, MAX_TILE)
    held = np.asarray(tiles.rows)[np.asarray(tiles.rows) < n_rows]
    assert sorted(held.tolist()) == list(range(sum(counts)))
    for row, sequence, position in zip(*map(np.asarray, tiles), strict=True):
        for place in np.flatnonzero(row < n_rows):
            assert starts[sequence] <= row[place] < starts[sequence + 1]
            assert position[place] == 2 + row[place] - starts[sequence]
        assert np.all(position[row >= n_rows] == -1)


jitted_tiles = jax.jit(paged.cut_tiles, static_argnums=(2, 3), compiler_options=QUICK)


def test_one_program_serves_every_length_and_every_split() -> None:
    base = Case((30, 9, 0), (5, 1, 0), 2, 4, 1, 2, 4, 4, 6)
    call = base.call()
    counted = jax.jit(lambda call: paged_attention(*call, window=6, implementation="xla"))
    for lengths, starts in (((30, 9, 0), (0, 5, 6, 6)), ((1, 1, 1), (0, 1, 2, 3)), ((28, 0, 12), (0, 4, 4, 8))):
        varied = call._replace(lengths=np.asarray(lengths, np.int32), query_starts=np.asarray(starts, np.int32))
        counted(jax.tree.map(lambda x: np.nan_to_num(x).astype(x.dtype), varied))
    assert counted._cache_size() == 1


def test_partial_results_merge_by_their_log_sum_exp() -> None:
    """A sequence cut in two at a page, each half attended apart, gives the whole."""
    case = Case((16,), (1,), 0, 4, 1, 2, 4, 4, None)
    call = case.call()
    whole, whole_lse = run(None, "xla", call)
    near = np.where(np.arange(call.page_table.shape[1]) < 2, call.page_table, 0)
    parts = [run(None, "xla", call._replace(page_table=near, lengths=np.array([8], np.int32)))]
    later = np.roll(call.page_table, -2, axis=1)
    parts.append(run(None, "xla", call._replace(page_table=later, lengths=np.array([8], np.int32))))
    lses = np.stack([lse for _, lse in parts])
    merged_lse = np.logaddexp.reduce(lses)
    merged = sum(np.exp(lse - merged_lse)[..., None] * np.asarray(out) for out, lse in parts)
    np.testing.assert_allclose(merged, whole, atol=1e-6)
    np.testing.assert_allclose(merged_lse, whole_lse, atol=1e-6)


def test_bfloat16_pools_give_bfloat16_results_within_rounding() -> None:
    case = Case((30, 12), (3, 1), 1, 4, 1, 4, 8, 8, 9)
    call = case.call()
    low = Call(*(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else jnp.asarray(x) for x in call))
    rounded = Call(*(np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else np.asarray(x) for x in low))
    exact, _ = run(9, "reference", rounded)
    out, lse = run(9, "xla", low)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2**-7 * float(np.abs(exact).max()))


def quantised(pool: np.ndarray, scale: np.ndarray, dtype: Any) -> tuple[jax.Array, np.ndarray]:
    """The pool as `write_pages` stores it, garbage included, and what its entries stand for."""
    flat = jnp.asarray(pool.reshape(-1, *pool.shape[2:]))
    slots = jnp.arange(len(flat), dtype=jnp.int32)
    stored = write_pages(jnp.zeros(pool.shape, dtype), flat, slots, jnp.asarray(scale))
    return stored, np.where(np.isnan(pool), np.nan, np.asarray(stored, np.float32) * scale[:, None])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_8_bit_pools_stand_for_their_entries_times_the_scale_of_the_head(
    dtype: Any, implementation: Implementation
) -> None:
    call = Case((30, 12, 0, 17), (9, 1, 0, 1), 1, 4, 3, 2, 8, 8, 6).call()
    k_scale, v_scale = np.array([0.01, 0.03, 0.05], np.float32), np.array([0.05, 0.02, 0.04], np.float32)
    k_pages, keys = quantised(call.k_pages, k_scale, dtype)
    v_pages, values = quantised(call.v_pages, v_scale, dtype)
    assert len(np.unique(np.asarray(k_pages, np.float32))) > 60  # the scales leave no entry at zero or at the limit
    stored = (call.q, k_pages, v_pages, *call[3:])
    options: dict[str, Any] = {"window": 6, "return_lse": True, "implementation": implementation}
    scales = {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}
    got = paged_attention(*map(jnp.asarray, stored), **scales, **options)
    expected = run(6, "reference", call._replace(k_pages=keys, v_pages=values))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_what_an_8_bit_pool_cannot_hold_is_held_to_its_largest_number(dtype: Any) -> None:
    top = float(jnp.iinfo(dtype).max if dtype == jnp.int8 else jnp.finfo(dtype).max)
    new = jnp.array([[[1e9]], [[-1e9]], [[0.26]], [[-0.24]]])
    written = write_pages(jnp.zeros((1, 4, 1, 1), dtype), new, jnp.arange(4, dtype=jnp.int32), jnp.array([0.5]))
    expected = [top, -top, 1.0, 0.0] if dtype == jnp.int8 else [top, -top, 0.52, -0.48]
    np.testing.assert_allclose(np.asarray(written, np.float32).ravel(), expected, rtol=2**-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_latent_values_are_the_first_columns_of_the_keys(implementation: Implementation) -> None:
    """Absorbed latent attention: all query heads share one key head, whose first columns are its values."""
    case = Case((30, 12), (9, 1), 1, 4, 1, 4, 8, 2, 7)
    call = case.call()
    sequences = [(keys, keys[..., :5]) for keys, _ in case.sequences()]
    expected = naive_paged(call.q, sequences, list(case.counts), window=7, scale=0.3)
    arrays = [jnp.asarray(array) for array in (call.q, call.k_pages, *call[3:])]
    got = paged_attention(
        *arrays[:2],
        None,
        *arrays[2:],
        window=7,
        scale=0.3,
        value_width=5,
        return_lse=True,
        implementation=implementation,
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


jitted_slots = jax.jit(token_slots, static_argnums=(3, 4, 5), compiler_options=QUICK)


@settings(max_examples=8, phases=NO_SHRINKING)
@given(case=cases())
def test_every_real_row_is_written_to_its_own_place_and_no_other_place_changes(case: Case) -> None:
    call = case.call()
    n_rows, n_pages = len(call.q), len(call.k_pages)
    slots = jitted_slots(call.page_table, call.query_starts, call.lengths, n_rows, case.page, n_pages)
    expected = np.full(n_rows, n_pages * case.page)
    row = 0
    for b, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        for position in range(length - count, length):
            expected[row] = call.page_table[b, position // case.page] * case.page + position % case.page
            row += 1
    np.testing.assert_array_equal(slots, expected)


def test_writes_to_null_pages_and_past_the_table_or_pool_are_dropped() -> None:
    table = jnp.array([[0, 2], [9, 1]], jnp.int32)  # a passed page, and a page that the pool does not have
    starts, lengths = jnp.array([0, 4, 8], jnp.int32), jnp.array([6, 4], jnp.int32)
    slots = jitted_slots(table, starts, lengths, 10, 2, 4)
    # Positions 2 to 5 of the first, of which 4 and 5 are past its table; then 0, 1 in page 9, and 2, 3.
    assert slots.tolist() == [4, 5, 8, 8, 8, 8, 2, 3, 8, 8]
    pool = jnp.zeros((4, 2, 1, 3))
    written = jax.jit(write_pages)(pool, jnp.ones((10, 1, 3)) * jnp.arange(1, 11)[:, None, None], slots)
    assert written[:, :, 0, 0].tolist() == [[0, 0], [7, 8], [1, 2], [0, 0]]


def test_negative_slots_are_not_counted_from_the_end() -> None:
    """Positions of a sequence with more queries than tokens would be negative: nothing is written for them."""
    table = jnp.array([[1, 2]], jnp.int32)
    slots = jitted_slots(table, jnp.array([0, 3], jnp.int32), jnp.array([1], jnp.int32), 3, 2, 3)
    assert slots.tolist() == [6, 6, 2]


def arguments(**changed: tuple[int, ...]) -> list[Any]:
    shapes: dict[str, tuple[int, ...]] = {"q": (3, 4, 8), "k_pages": (5, 2, 2, 8), "v_pages": (5, 2, 2, 8)}
    ints: dict[str, tuple[int, ...]] = {"page_table": (2, 3), "query_starts": (3,), "lengths": (2,)}
    arrays = [jnp.zeros(changed.get(name, shape)) for name, shape in shapes.items()]
    return arrays + [jnp.zeros(changed.get(name, shape), jnp.int32) for name, shape in ints.items()]


def latent_arguments() -> list[Any]:
    q, k_pages, _, *rest = arguments()
    return [q, k_pages, None, *rest]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (arguments(), {"window": 0}, "window=0: expected None or at least 1"),
        (arguments(q=(3, 5, 8)), {}, "q has 5 heads, k has 2"),
        (arguments(query_starts=(2,)), {}, "query_starts has 2 entries, expected 3"),
        (arguments(lengths=(3,)), {}, "lengths has 3 entries, the page table 2 sequences"),
        (arguments(k_pages=(5, 2, 2, 4)), {}, "k_pages has head width 4, q has 8"),
        (arguments(v_pages=(5, 4, 2, 8)), {}, r"v_pages is \(5, 4, 2\) and k_pages \(5, 2, 2\)"),
        (arguments(), {"k_scale": jnp.ones(3)}, r"k_scale is \(3,\), expected one number per key head \(2,\)"),
        (arguments(), {"value_width": 4}, "value_width=4 with v_pages: expected None"),
        (latent_arguments(), {}, "value_width=None without v_pages: expected 1 to 8"),
        (latent_arguments(), {"value_width": 4, "v_scale": jnp.ones(2)}, "v_scale is given without v_pages"),
        (arguments(), {"implementation": "cudnn"}, "implementation='cudnn': expected one of auto, reference, xla"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arrays: Any, options: dict[str, Any], message: str) -> None:
    unchecked = getattr(paged_attention, "__wrapped__", paged_attention)
    with pytest.raises(ValueError, match=message):
        unchecked(*arrays, **options)
