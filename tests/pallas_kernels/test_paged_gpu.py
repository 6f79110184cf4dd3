"""The Hopper kernel of paged_attention, interpreted on the CPU with race detection, and how its work is cut up."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import paged_plan
from pallas_kernels.gpu.paged import paged_attention_gpu
from pallas_kernels.gpu.paged_plan import Sizes, plan_for
from pallas_kernels.reference import paged_attention_reference
from pallas_kernels.visibility import visible

pytestmark = [
    pytest.mark.mosaic_gpu,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax >= 0.11"),
]

NARROW = {"int8": 40.0, "float8_e4m3fn": 1.0}  # 8-bit pools, and what standard normal entries are multiplied with


class Call(NamedTuple):
    """The array arguments of paged_attention."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    query_starts: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """A ragged batch: of sequence b the last `counts[b]` of `lengths[b]` tokens are queries; `padding` rows follow.

    `chip` is the number of multiprocessors that splits are chosen for; `ring` the pages that a sequence uses in turn.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    padding: int = 0
    page: int = 16
    K: int = 1
    G: int = 2
    H: int = 64
    Hv: int = 64
    window: int | None = None
    dtype: Any = jnp.bfloat16
    pool: str | None = None
    scale: float = 0.125
    chip: int = 1
    ring: int | None = None

    def call(self) -> Call:
        """Pages in random order; NaN in the null page, in free pages, behind every window and past every length."""
        rng = np.random.default_rng(0)
        entries = [-(-n // self.page) for n in self.lengths]
        n_pages = sum(entries) + 3
        free = list(1 + rng.permutation(n_pages - 1))
        factor = NARROW.get(self.pool or "", 1.0)
        pools = [np.full((n_pages, self.page, self.K, h), np.nan, np.float32) for h in (self.H, self.Hv)]
        table = np.zeros((len(self.lengths), max(entries) + 1), np.int32)
        for b, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            oldest = length if not count else max(length - count - (self.window or length) + 1, 0)
            for position in range(oldest, length):
                entry = position // self.page
                if self.ring and entry >= self.ring and not table[b, entry]:
                    table[b, entry] = table[b, entry - self.ring]
                table[b, entry] = table[b, entry] or free.pop()
                for pool in pools:
                    pool[table[b, entry], position % self.page] = factor * rng.standard_normal(pool.shape[2:])
        q = rng.standard_normal((sum(self.counts) + self.padding, self.K * self.G, self.H))
        stored = [np.rint(np.nan_to_num(pool, nan=99.0)) if self.pool == "int8" else pool for pool in pools]
        return Call(
            jnp.asarray(q, self.dtype),
            *(jnp.asarray(pool, self.pool or self.dtype) for pool in stored),
            jnp.asarray(table),
            jnp.asarray(np.concatenate([[0], np.cumsum(self.counts)]), jnp.int32),
            jnp.asarray(self.lengths, jnp.int32),
        )

    def scales(self) -> dict[str, Any]:
        """Factors of keys and values, one per key head; none for 16-bit pools."""
        if self.pool is None:
            return {"k_scale": None, "v_scale": None}
        ones = jnp.arange(1, self.K + 1, dtype=jnp.float32) / NARROW[self.pool]
        return {"k_scale": ones, "v_scale": 3 * ones}


def races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def careless(case: Case, call: Call) -> jax.Array:
    """Attention as a careless program would compute it: scores and weights rounded to the dtype of q."""
    out = np.zeros((call.q.shape[0], case.K * case.G, case.Hv), np.float32)
    factors = [1.0 if x is None else np.asarray(x)[:, None] for x in case.scales().values()]
    pools = [np.asarray(pool, np.float32) * f for pool, f in zip(call[1:3], factors, strict=True)]
    for b, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
        at = np.arange(length)
        places = np.asarray(call.page_table)[b, at // case.page], at % case.page
        mask = np.asarray(visible(jnp.arange(length - count, length)[:, None], jnp.asarray(at)[None], case.window))
        seen = mask.any(axis=0)[:, None, None]
        keys, values = (jnp.asarray(np.repeat(np.where(seen, p[places], 0), case.G, axis=1), case.dtype) for p in pools)
        rows = slice(int(call.query_starts[b]), int(call.query_starts[b + 1]))
        scores = jnp.einsum("TNH,SNH->NTS", call.q[rows], keys) * jnp.asarray(case.scale, case.dtype)
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
        out[rows] = jnp.einsum("NTS,SNH->TNH", weights, values) if count else 0
    return jnp.asarray(out)


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both results equal the float32 definition within twice the rounding of the dtype, without a race."""
    monkeypatch.setattr(paged_plan, "MULTIPROCESSORS", case.chip)
    call = case.call()
    wide = [x if x.dtype == jnp.int32 else x.astype(jnp.float32) for x in call]
    settings = {"window": case.window, "scale": case.scale, **case.scales()}
    wanted, wanted_lse = paged_attention_reference(*wide, **settings)
    out, lse = paged_attention_gpu(*call, **settings, interpret=True)
    assert not races_found()
    assert (out.dtype, lse.dtype) == (case.dtype, jnp.float32)
    assert not out[~jnp.isfinite(wanted_lse)].any()
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-5)
    naive = jnp.abs(careless(case, call) - wanted).max()
    assert jnp.abs(out.astype(jnp.float32) - wanted).max() <= 2 * naive + 1e-6


DECODING = Case((150, 0, 70, 1), (1, 0, 1, 1), padding=1, G=4, chip=8)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(DECODING, id="decoding: lengths of one and none, padding, keys split in two"),
        pytest.param(
            Case((200, 129, 64), (1, 1, 1), page=32, window=40, H=128, ring=3, scale=-0.1),
            id="decoding from rings: the window ends within a block, a negative scale, wide keys",
        ),
        pytest.param(
            Case((90, 40), (3, 1), page=32, window=64, pool="int8", G=3, K=2, chip=6),
            id="a few tokens at once over int8 pages: window edge on a block border, three heads share a key head",
        ),
        pytest.param(
            Case((150, 20), (1, 1), page=256, pool="float8_e4m3fn", G=16), id="float8 pages larger than a block"
        ),
        pytest.param(
            Case((150, 200, 10), (130, 1, 3), page=16, window=60, Hv=128),
            id="a chunk across pages and windows beside decoding, wide values",
        ),
        pytest.param(
            Case((90,), (90,), padding=2, page=128, G=5, dtype=jnp.float16),
            id="a whole prompt in float16: five heads share a key head",
        ),
    ],
)
def test_results_equal_the_definition_without_a_race(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def test_a_batch_without_queries_gives_zeros() -> None:
    call = Case((5, 3), (0, 0), padding=2).call()
    out, lse = paged_attention_gpu(*call, window=None, scale=1.0, interpret=True)
    assert not out.any()
    assert jnp.isneginf(lse).all()


def caught(case: Case) -> bool:
    """Whether a run shows a race, a barrier that ends out of step, or a wrong result."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    call = case.call()
    wide = [x if x.dtype == jnp.int32 else x.astype(jnp.float32) for x in call]
    settings = {"window": case.window, "scale": case.scale, **case.scales()}
    wanted, _ = paged_attention_reference(*wide, **settings)
    try:
        out, _ = jax.block_until_ready(paged_attention_gpu(*call, **settings, interpret=True))
    except Exception as error:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        if "arrier" not in str(error):
            raise
        return True
    return races_found() or not np.allclose(out.astype(jnp.float32), wanted, atol=0.03)


ALONE = Case((300,), (1,), page=64, G=1)
BUGS = {
    "none": ALONE,
    "keys used before they arrived": ALONE,
    "values released before they are used": ALONE,
    "strangers not cleared": ALONE,
    "widened without a fence": dataclasses.replace(ALONE, pool="int8"),
    "the other's half not awaited": Case((100,), (70,), page=64, G=1),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.gpu import paged_blocks, paged_forward

    await_values, clear_strangers = paged_forward.await_values, paged_forward.clear_strangers

    def await_and_release(blocks: Any, i: Any) -> None:
        await_values(blocks, i)
        plgpu.barrier_arrive(blocks.memory.v_free.at[blocks.slot(i)])

    def clear_and_go_on(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(plgpu, "barrier_wait", lambda barrier: None)
            clear_strangers(*arguments)

    if bug.startswith("keys"):
        monkeypatch.setattr(paged_forward, "await_keys", lambda blocks, i: None)
    elif bug.startswith("values"):
        monkeypatch.setattr(paged_forward, "await_values", await_and_release)
        monkeypatch.setattr(paged_forward, "release_values", lambda blocks, i: None)
    elif bug.startswith("strangers"):
        monkeypatch.setattr(paged_forward, "clear_strangers", lambda *_: None)
    elif bug.startswith("widened"):
        monkeypatch.setattr(paged_blocks, "_fence", lambda: None)
    elif bug.startswith("the other"):
        monkeypatch.setattr(paged_forward, "clear_strangers", clear_and_go_on)
    monkeypatch.setattr(paged_plan, "DECODING_STAGES", 2)
    monkeypatch.setattr(paged_plan, "MULTIPROCESSORS", 1)  # one split with all blocks
    jax.clear_caches()  # the traced kernel of another bug
    assert caught(BUGS[bug]) == (bug != "none")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("consumers", [1, 2])
def test_the_shares_of_a_tile_are_exactly_the_blocks_that_it_sees(consumers: int, splits: int) -> None:
    """Against the definition of visibility: every visible block once, and no mask only where every row sees all."""
    from pallas_kernels.gpu.paged_forward import _share, _steps

    block, group = 64, 3
    for window, first, tokens in itertools.product((None, 1, 64, 100), (0, 63, 130, 400), (1, 21)):
        plan = plan_for(Sizes(tokens, 1, group, 1, 64, 64, 1024, 2), window)
        plan = dataclasses.replace(plan, consumers=consumers, block=block, splits=splits)
        last = first + tokens - 1
        at, key = np.arange(first, last + 1), np.arange(512)
        seen = np.asarray(visible(jnp.asarray(at)[:, None], jnp.asarray(key)[None], window))  # [tokens, keys]
        wanted = np.flatnonzero(seen.any(axis=0).reshape(-1, block).any(axis=1))
        for consumer in range(consumers):
            rows = np.clip(np.arange(consumer * 64, consumer * 64 + 64) // group, 0, tokens - 1)
            whole = seen[rows].all(axis=0).reshape(-1, block).all(axis=1)
            steps = _steps(plan, jnp.int32(first), jnp.int32(last), jnp.int32(consumer))
            shares = [_share(steps, jnp.int32(split), splits) for split in range(splits)]
            visited = [n for share in reversed(shares) for n in range(int(share.start), int(share.stop))]
            assert visited == wanted.tolist()
            assert max(int(s.stop - s.start) for s in shares) == -(-len(wanted) // splits)
            bare = [n for share in shares for n in range(int(share.bare_start), int(share.bare_stop))]
            assert sorted(bare) == np.flatnonzero(whole).tolist()
