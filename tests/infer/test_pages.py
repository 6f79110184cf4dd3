"""Pages of the cache: owned by one sequence at a time, never lost, and no more of them than a window needs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.pages import PageTables, bytes_per_page
from ministral_jax.cache import CachePlan, allocate_cache, pages_held, plan_cache
from ministral_jax.config import ModelConfig, RopeConfig, Window

BFLOAT16 = jnp.dtype(jnp.bfloat16)


def config(*windows: Window, heads: int = 1, head_dim: int = 4, max_length: int = 131072) -> ModelConfig:
    return ModelConfig(
        dim=8, n_layers=len(windows), n_heads=heads, n_kv_heads=heads, head_dim=head_dim, hidden_dim=8, vocab_size=8,
        norm_eps=1e-5, rope=RopeConfig(theta=1e4), windows=windows, max_length=max_length,
    )  # fmt: skip


def owned(tables: PageTables, group: int) -> list[int]:
    """Every page number in a group's tables, with repetitions if there were any."""
    table = tables.tables[group]
    return sorted(table[table > 0].tolist())


def assert_consistent(tables: PageTables, plan: CachePlan) -> None:
    for i, group in enumerate(plan.groups):
        pages = owned(tables, i)
        assert len(set(pages)) == len(pages), "a page has two owners"
        assert all(0 < page < group.pages for page in pages)
        assert tables.pages_held(i) == len(pages)


@settings(max_examples=60)
@given(data=st.data(), page_size=st.sampled_from([1, 4, 16]), chunk=st.integers(1, 20))
def test_pages_are_never_shared_and_always_suffice(data: st.DataObject, page_size: int, chunk: int) -> None:
    """Sequences that grow by any amounts up to the planned chunk, end and begin again."""
    windows: tuple[Window, ...] = (None, 1, 6, 16)
    plan = plan_cache(config(*windows), batch=3, length=64, chunk=chunk, page_size=page_size, dtype=BFLOAT16)
    tables, at = PageTables(plan, 3), [0, 0, 0]
    for b, grow in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, chunk)), max_size=40)):
        stop = min(at[b] + grow, 64)
        if grow == 0 or stop == at[b]:
            tables.release(b)
            at[b] = 0
            assert all(not table[b].any() for table in tables.tables)
        else:
            tables.advance(b, at[b], stop)
            for group, table in zip(plan.groups, tables.tables, strict=True):
                oldest = 0 if group.window is None else max(at[b] - group.window + 1, 0)
                assert table[b, oldest // page_size : (stop - 1) // page_size + 1].all(), "a visible page is missing"
                assert np.count_nonzero(table[b]) <= group.pages_per_sequence
            at[b] = stop
        assert_consistent(tables, plan)


def test_no_page_is_lost_over_many_sequences() -> None:
    """Each of them takes all the pages there are."""
    plan = plan_cache(config(None, 6), batch=2, length=40, chunk=8, page_size=4, dtype=BFLOAT16)
    tables = PageTables(plan, 2)
    for _ in range(20):
        for b in (0, 1):
            for start in range(0, 40, 8):
                tables.advance(b, start, start + 8)
        assert tables.pages_held(0) == plan.groups[0].pages - 1
        for b in (0, 1):
            tables.release(b)
        assert [tables.pages_held(group) for group in (0, 1)] == [0, 0]


def test_a_position_past_the_cache_is_refused() -> None:
    plan = plan_cache(config(None), batch=1, length=10, chunk=8, page_size=4, dtype=BFLOAT16)
    with pytest.raises(ValueError, match="position 10 is past the cache's length 10"):
        PageTables(plan, 1).advance(0, 4, 11)


@settings(max_examples=200)
@given(length=st.integers(1, 60), window=st.integers(1, 30), chunk=st.integers(1, 20), page=st.integers(1, 9))
def test_the_pages_of_a_window_are_the_most_that_any_chunk_touches(
    length: int, window: int, chunk: int, page: int
) -> None:
    """Counted place by place: a chunk at `start` needs the pages of positions start - window + 1 to its end."""

    def touched(start: int) -> int:
        last = min(start + chunk, length) - 1
        return last // page - max(start - window + 1, 0) // page + 1

    most = max(touched(start) for start in range(length))
    assert most <= pages_held(length, window, chunk, page) <= most + 1
    assert pages_held(length, None, chunk, page) == -(-length // page)


def full_bytes(model: ModelConfig, length: int, itemsize: int) -> int:
    return 2 * model.n_layers * length * model.n_kv_heads * model.head_dim * itemsize


def test_ministral_8b_keeps_at_most_44_percent_of_a_full_cache_plus_one_chunk() -> None:
    """At 128k tokens: a quarter of the layers in full, the others 32k of it. As allocated, with keys of two numbers."""
    model = config(*(None, 32768, 32768, 32768) * 9, heads=1, head_dim=2)
    chunk, page = 512, 64
    plan = plan_cache(model, batch=1, length=131072, chunk=chunk, page_size=page, dtype=BFLOAT16)
    cache = allocate_cache(model, plan, BFLOAT16)
    weighed = sum(np.asarray(pool).nbytes for pool in (*cache.keys, *cache.values))
    full = full_bytes(model, 131072, 2)
    assert full * 8 * 64 == 19_327_352_832  # of the 8 heads of 128 that the model has
    slack = full_bytes(model, chunk + 2 * page, 2)  # the chunk, the page a window begins in, the null page
    assert weighed <= 0.44 * full + slack


def test_allocated_arrays_are_as_small_as_planned() -> None:
    """The same pattern 64 times smaller, weighed as it was allocated, float32."""
    model = config(*(None, 512, 512, 512) * 3, heads=2, head_dim=8)
    plan = plan_cache(model, batch=1, length=2048, chunk=16, page_size=8, dtype=jnp.dtype(jnp.float32))
    cache = allocate_cache(model, plan, jnp.dtype(jnp.float32))
    weighed = sum(np.asarray(pool).nbytes for pool in (*cache.keys, *cache.values))
    assert weighed == plan.n_bytes == cache.n_bytes
    assert sum(bytes_per_page(cache, i) * group.pages for i, group in enumerate(plan.groups)) == weighed
