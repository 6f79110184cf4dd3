"""The TPU kernels of paged_attention, interpreted on CPU: against the textbook loop, races, planted bugs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import paged_attention
from pallas_kernels.dispatch import Target
from pallas_kernels.tpu import paged_fetch, paged_rows
from pallas_kernels.tpu.paged import paged_attention_tpu, unsupported
from pallas_kernels.tpu.paged_kernel import vector_memory
from pallas_kernels.tpu.paged_plan import PagedSizes, Shapes, plan
from pallas_kernels.tpu.paged_tiles import paged_tiles
from pallas_kernels.visibility import visible

from .naive_attention import naive_paged
from .test_paged_attention import Call, Case
from .test_paged_dispatch import problem

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}  # most of this file's time is compiling
if jax.__version_info__ < (0, 11):  # later ones have no such option
    QUICK["xla_cpu_use_fusion_emitters"] = False
NO_SHRINKING = (Phase.explicit, Phase.generate)  # every smaller example would be compiled anew
# Blocks of two pages of 4, tiles of 8 queries, pieces of the least length: short sequences have many of them.
SIZES = PagedSizes(block_tokens=8, row_entries=16, packed_scores=64, row_tokens=4, tile_rows=8, lanes=8, chunk=4)
PIECE = 2  # entries of a piece of the page table; Mosaic takes none below 128, the interpreters any


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.tpu.paged_plan.LANES", PIECE)
    monkeypatch.setattr(paged_fetch, "PAGES_STARTED", 1)


# Knows vector memory as a chip does, NaN where nothing was written, and compiles in half the time of `True`.
TPU = pltpu.InterpretParams(uninitialized_memory="nan")


def kernels(
    case: Case, call: Call, interpret: Any = TPU, sizes: PagedSizes = SIZES, **scales: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of the kernels."""
    run = functools.partial(
        paged_attention_tpu,
        window=case.window,
        scale=case.head_dim**-0.5,
        k_scale=scales.get("k_scale"),
        v_scale=scales.get("v_scale"),
        interpret=interpret,
        sizes=sizes._replace(table_piece=PIECE),
    )
    out, lse = jax.jit(run, compiler_options=QUICK)(*map(jnp.asarray, call))
    return np.asarray(out, np.float32), np.asarray(lse)


def expected(case: Case, call: Call) -> tuple[np.ndarray, np.ndarray]:
    return naive_paged(call.q, case.sequences(), list(case.counts), window=case.window)


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def case(**changes: Any) -> Case:
    plain: dict[str, Any] = {"lengths": (30, 9, 0, 17), "counts": (1, 1, 0, 1), "padding": 1, "page": 4}
    options: dict[str, Any] = {"kv_heads": 2, "group": 2, "head_dim": 8, "value_dim": 8, "window": 6}
    return Case(**{**plain, **options, **changes})


# One for each form of the kernel: several queries by rows; decoding and prompts in two calls; heads kept apart.
VARIANTS = {
    "few": case(counts=(3, 2, 0, 4), padding=3, window=None),
    "mixed": case(counts=(13, 1, 0, 17), value_dim=4),
    "by heads": case(kv_heads=3, window=5),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    counts = [min(n, draw(st.sampled_from([0, 1, 1, 3, 9, n]))) for n in lengths]
    return Case(
        lengths=tuple(lengths),
        counts=tuple(counts),
        padding=draw(st.integers(0 if sum(counts) else 1, 3)),
        page=draw(st.sampled_from([2, 4, 6, 16])),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 3, 4])),
        head_dim=draw(st.sampled_from([4, 8])),
        value_dim=draw(st.sampled_from([2, 8])),
        window=draw(st.sampled_from([None, 1, 3, 8, 9, 100])),
    )


@settings(max_examples=2, phases=NO_SHRINKING)
@given(case=cases())
def test_the_kernels_equal_the_textbook_loop(case: Case) -> None:
    """NaN stands in the null page, in free pages, behind every window and past every length."""
    check_against_the_textbook(case)


@pytest.mark.slow
@settings(max_examples=40, phases=NO_SHRINKING)
@given(case=cases())
def test_the_kernels_equal_the_textbook_loop_in_many_more_batches(case: Case) -> None:
    check_against_the_textbook(case)


def check_against_the_textbook(case: Case) -> None:
    call = case.call()
    assert_close(kernels(case, call), expected(case, call))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_races_with_its_own_copies_or_reads_what_was_never_written(variant: str) -> None:
    case = VARIANTS[variant]
    call = case.call()
    assert_close(kernels(case, call, dataclasses.replace(TPU, detect_races=True)), expected(case, call))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_a_table_that_repeats_its_pages_is_a_ring() -> None:
    plain = case(lengths=(22,), counts=(2,), kv_heads=1, window=7)
    call = plain.call()
    pools = [np.full((4, 4, 1, 8), np.nan, np.float32) for _ in range(2)]
    for position in range(22):
        for pool, array in zip(pools, plain.sequences()[0], strict=True):
            pool[1 + position // 4 % 3, position % 4] = array[position]
    table = 1 + np.arange(call.page_table.shape[1], dtype=np.int32)[None] % 3
    ring = call._replace(k_pages=pools[0], v_pages=pools[1], page_table=table)
    assert_close(kernels(plain, ring), expected(plain, call))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(jnp.int8, case()), (jnp.float8_e4m3fn, case(lengths=(30,), counts=(13,)))],
    ids=["int8", "float8_e4m3fn"],
)
def test_8_bit_pools_stand_for_their_entries_times_the_scale_of_the_head(dtype: Any, shape: Case) -> None:
    call = shape.call()
    scales: dict[str, Any] = {
        "k_scale": jnp.array([0.02, 0.05], jnp.float32),
        "v_scale": jnp.array([0.04, 0.03], jnp.float32),
    }
    pools = {}
    for name, scale in {"k_pages": "k_scale", "v_pages": "v_scale"}.items():
        numbers = np.nan_to_num(getattr(call, name), nan=1.0) / np.asarray(scales[scale])[:, None]
        pools[name] = jnp.asarray(numbers).astype(dtype)
    stored = jax.tree.map(jnp.asarray, call._replace(**pools))
    options: dict[str, Any] = {"window": 6, "return_lse": True, **scales}
    want = jax.jit(functools.partial(paged_attention, implementation="reference", **options))(*stored)
    assert_close(kernels(shape, stored, **scales), want)


def test_bfloat16_gives_results_within_rounding() -> None:
    shape = case(lengths=(30,), counts=(13,))
    call = shape.call()
    low = Call(*(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in call))  # pyright: ignore
    rounded = Call(*(np.asarray(x, np.float32) if x.dtype == jnp.bfloat16 else x for x in low))
    sequences = [tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in s) for s in shape.sequences()]
    exact, exact_lse = naive_paged(rounded.q, sequences, list(shape.counts), window=shape.window)  # pyright: ignore
    out, lse = kernels(shape, low)
    np.testing.assert_allclose(out, exact, atol=2**-7 * float(np.abs(exact).max()))
    np.testing.assert_allclose(lse, exact_lse, atol=2**-7 * 4)


def test_more_queries_than_tokens_see_nothing() -> None:
    """A sequence whose first rows would stand at negative positions: these give zeros, as in the definition."""
    shape = case(lengths=(30, 9), counts=(2, 1), window=None)
    call = shape.call()._replace(lengths=np.array([30, 0], np.int32))
    out, lse = kernels(shape, call)
    want = naive_paged(call.q, shape.sequences(), [2, 0], window=None)
    assert_close((out[:2], lse[:2]), (want[0][:2], want[1][:2]))
    assert not out[2:].any()
    assert np.all(lse[2:] == -np.inf)


def test_a_copy_that_is_not_awaited_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the pages of a block are computed without waiting for them."""
    monkeypatch.setattr(paged_fetch.Pipeline, "_await_block", lambda self, m, block, slot: None)
    kernels(case(), case().call(), dataclasses.replace(TPU, detect_races=True, dma_execution_mode="eager"))
    assert interpret_pallas_call.races is not None
    assert interpret_pallas_call.races.races_found


def test_a_window_one_key_too_wide_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: `<=` for `<` at the far edge of the window, within a page that is fetched anyway."""
    monkeypatch.setattr(paged_rows, "visible", lambda query, key, window: visible(query, key, window + 2))  # two heads
    shape = case(window=5, lengths=(30,), counts=(1,), padding=0)
    call = shape.call()
    call = call._replace(k_pages=np.nan_to_num(call.k_pages), v_pages=np.nan_to_num(call.v_pages))
    assert not np.allclose(kernels(shape, call)[1], expected(shape, call)[1], atol=1e-3)


@pytest.mark.parametrize("counts", [(5, 1, 0), (4, 4, 4), (0, 0, 9), (1, 1, 1), (0, 7, 3), (0, 0, 0)])
@pytest.mark.parametrize("least", [1, 2])
def test_every_query_row_of_a_chosen_sequence_lies_in_exactly_one_tile(counts: tuple[int, ...], least: int) -> None:
    lengths = np.add(counts, 2).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiles = jitted_tiles(starts, lengths, np.greater_equal(counts, least))
    held = []
    for m in range(int(tiles.used[0])):
        rows = tiles.row[m] + np.arange(tiles.count[m])
        sequence = tiles.sequence[m]
        assert tiles.count[m] > 0
        assert np.all((starts[sequence] <= rows) & (rows < starts[sequence + 1]))
        assert tiles.first[m] == 2 + tiles.row[m] - starts[sequence]
        held += rows.tolist()
    wanted = [r for b, n in enumerate(counts) if n >= least for r in range(starts[b], starts[b + 1])]
    assert sorted(held) == wanted
    assert not np.any(np.asarray(tiles.count)[int(tiles.used[0]) :])
    assert np.asarray(tiles.working)[: int(tiles.used[0])].tolist() == list(range(int(tiles.used[0])))


@functools.partial(jax.jit, compiler_options=QUICK)
def jitted_tiles(starts: Any, lengths: Any, chosen: Any) -> Any:
    return paged_tiles(starts, lengths, 4, 13 // 4 + 3, chosen)


PROBLEM = problem(Target("tpu", "TPU v6 lite"), page=16, table_width=16384)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": "float16"}, "q is float16, expected bfloat16 or float32"),
        ({"pool_dtype": "float16"}, "the pools are float16, expected bfloat16 or float32 or int8 or float8_e4m3fn"),
        ({"widths": (64, 128)}, "q has head width 64, expected a multiple of 128"),
        ({"widths": (128, 96)}, "v has head width 96, expected a multiple of 128"),
        ({"widths": (64, 128), "interpret": True}, None),
        ({"heads": (12, 3), "page": 20}, "pages of 20 tokens with 3 key heads, expected a multiple of 8 tokens"),
    ],
)
def test_what_the_kernels_do_not_serve_is_named(changes: dict[str, Any], reason: str | None) -> None:
    assert unsupported(PROBLEM._replace(**changes)) == reason


def test_a_page_beyond_the_vector_memory_is_named() -> None:
    reason = unsupported(PROBLEM._replace(pool_dtype="float32", widths=(1024, 1024), heads=(256, 256), page=256))
    assert reason is not None
    assert reason.startswith("pages of 256 tokens with 256 key heads of width 1024/1024 need ")


@pytest.mark.parametrize(("chip", "mib"), [("v6e", 96), ("tpu7x", 48)])
def test_blocks_and_tiles_shrink_until_they_fit_the_vector_memory(chip: Any, mib: int) -> None:
    pool = jnp.dtype("int8")
    shapes = Shapes(jnp.dtype("bfloat16"), (pool, pool), 2048, 4, 128, 64, 128, 128, 16, 1024, None)
    call = plan(shapes, chip, False, PagedSizes(block_bytes=64 << 20, block_tokens=2048))[-1].call
    assert vector_memory(call, 128, 128, shapes.dtype, shapes.pool_dtypes) <= mib << 20
    assert call.paging.block < 2048
    assert call.tile < 512
    assert call.vmem_limit_bytes > mib << 19


def test_a_call_by_name_runs_them_with_the_sizes_of_the_chip() -> None:
    """With `interpret=True`, which reads pages as the compiled kernel does, reshaped in place."""
    shape = case()
    options: dict[str, Any] = {"window": shape.window, "return_lse": True}
    run = functools.partial(paged_attention, implementation="pallas_tpu", interpret=True, **options)
    got = jax.jit(run, compiler_options=QUICK)(*map(jnp.asarray, shape.call()))
    assert_close(got, expected(shape, shape.call()))
