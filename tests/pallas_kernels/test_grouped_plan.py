"""How a grouped product is cut on Hopper: tiles by group, sizes by shape. No kernel is needed for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.gpu.grouped_plan import most_visits, plan_gradient, plan_product, visits
from pallas_kernels.gpu.tiles import SHARED_MEMORY_LIMIT

ROWS, GROUPS = 700, 6
tiles_of = functools.partial(jax.jit, static_argnums=(1, 2))(visits)


@pytest.mark.parametrize("rows", [64, 128])
@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
def test_tiles_hold_every_row_of_every_group_once(rows: int, cuts: list[int]) -> None:
    """As many tiles as `sum of ceil(size / rows)`: none for empty groups, none with rows of two groups."""
    sizes = np.diff([0, *sorted(cuts)])
    expert, start, stop, (used,) = map(np.asarray, tiles_of(jnp.asarray(sizes, jnp.int32), ROWS, rows))
    assert used == np.sum(-(-sizes // rows)) <= len(expert) == most_visits(ROWS, GROUPS, rows)
    held = [(e, row) for e, a, b in zip(expert[:used], start[:used], stop[:used], strict=True) for row in range(a, b)]
    assert held == list(zip(np.repeat(np.arange(GROUPS), sizes), range(sizes.sum()), strict=True))
    assert (stop - start)[:used].max(initial=0) <= rows


def test_the_bound_on_tiles_is_reached() -> None:
    """By groups of one row more than whole tiles."""
    sizes = jnp.asarray([65, 1, 1, 65], jnp.int32)
    assert int(visits(sizes, 132, 64).used[0]) == 6 == most_visits(132, 4, 64)


@pytest.mark.parametrize("rows", [1, 2, 16, 128, 512, 4096, 16384])
@pytest.mark.parametrize(("n_experts", "widths"), [(8, (4096, 14336)), (128, (7168, 4096)), (8, (64, 192))])
def test_plans_fit_the_shared_memory_and_keep_copies_in_flight(
    rows: int, n_experts: int, widths: tuple[int, int]
) -> None:
    for plan in (plan_product(rows, n_experts, widths[0], 132), plan_gradient(*widths, 132)):
        assert plan.bytes_needed <= SHARED_MEMORY_LIMIT
        assert plan.stages >= 4
        assert widths[0] % plan.columns == 0 or widths[1] % plan.columns == 0


@pytest.mark.parametrize(("n_out", "columns"), [(14336, 256), (4096, 64)])
def test_one_token_is_spread_over_the_multiprocessors(n_out: int, columns: int) -> None:
    """Mixtral 8x7B: two experts are hit. Narrow tiles only where wide ones would leave programs without one."""
    plan = plan_product(2, 8, n_out, 132)
    assert (plan.rows, plan.columns) == (64, columns)
    assert 0.8 * 132 <= 2 * n_out // columns <= 132


def test_many_rows_take_the_largest_tiles() -> None:
    assert (plan_product(16384, 8, 14336, 132).rows, plan_product(16384, 8, 14336, 132).columns) == (128, 256)
