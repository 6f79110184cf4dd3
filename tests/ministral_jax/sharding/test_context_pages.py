"""Pages of a full layer spread over the context axis: whose each is, and decoding across them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ministral_jax.sharding.context_pages import (
    context_paged_attention,
    own_lengths,
    own_page_table,
    split_page_table,
)
from ministral_jax.sharding.merge import merge_partial
from pallas_kernels import write_pages
from pallas_kernels.paged_attention import token_slots

C, PAGE = 4, 4
LENGTHS = [0, 1, 4, 5, 16, 17, 39, 40]


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((C,), ("context",), devices=jax.devices()[:C], axis_types=(jax.sharding.AxisType.Auto,))


def test_page_n_belongs_to_shard_n_mod_c() -> None:
    table = jnp.asarray(np.arange(1, 21).reshape(2, 10), jnp.int32)
    split = np.asarray(split_page_table(table, C))
    assert split.shape == (C, 2, 3)
    for shard in range(C):
        for b in range(2):
            mine = [int(table[b, n]) for n in range(10) if n % C == shard]
            assert split[shard, b].tolist() == mine + [0] * (3 - len(mine))
            own = np.asarray(own_page_table(jnp.asarray(split[shard]), shard, C))[b, :10]
            assert own.tolist() == [int(table[b, n]) if n % C == shard else 0 for n in range(10)]


def test_the_shards_hold_each_token_once() -> None:
    lengths = jnp.arange(70, dtype=jnp.int32)
    found = np.stack([own_lengths(lengths, PAGE, shard, C) for shard in range(C)])
    for length in range(70):
        owners = [position // PAGE % C for position in range(length)]
        assert found[:, length].tolist() == [owners.count(shard) for shard in range(C)]


def spread_pools(rng: np.random.Generator, lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One pool and its table, and the same pages dealt to C shards in another order, NaN where nothing was written."""
    pages = -(-max(lengths) // PAGE)
    n_pages = len(lengths) * pages + 1
    pool = np.full((n_pages, PAGE, 2, 8), np.nan, np.float32)
    table = np.zeros((len(lengths), pages), np.int32)
    free = iter(rng.permutation(np.arange(1, n_pages)))
    for b, length in enumerate(lengths):
        for position in range(length):
            if position % PAGE == 0:
                table[b, position // PAGE] = next(free)
            pool[table[b, position // PAGE], position % PAGE] = rng.normal(size=(2, 8))
    local, local_table = np.full((C, n_pages, PAGE, 2, 8), np.nan, np.float32), np.zeros_like(table)
    taken = [1] * C
    for b, n in zip(*np.nonzero(table), strict=True):
        shard = n % C
        local[shard, taken[shard]] = pool[table[b, n]]
        local_table[b, n] = taken[shard]
        taken[shard] += 1
    return pool, table, local, local_table


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"implementation": "reference"}, id="definition"),
        pytest.param({"implementation": "xla"}, id="xla", marks=pytest.mark.long),
        pytest.param({"implementation": "pallas_tpu", "interpret": True}, id="tpu", marks=pytest.mark.long),
    ],
)
def test_decoding_over_spread_pages_equals_one_pool(how: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    pool, table, local, local_table = spread_pools(rng, LENGTHS)
    q = jnp.asarray(rng.normal(size=(len(LENGTHS), 4, 8)), jnp.float32)
    want = [
        naive_attention(np.asarray(q[b]), pool[table[b]].reshape(-1, 2, 8)[:length]) for b, length in enumerate(LENGTHS)
    ]

    def decode(pool: Any, shard_table: Any) -> Any:
        out = context_paged_attention(q, pool[0], -pool[0], shard_table[0], lengths, axis_name="context", **how)
        return out[None]

    spec = PartitionSpec("context")
    across = jax.jit(jax.shard_map(decode, mesh=mesh(), in_specs=(spec, spec), out_specs=spec, check_vma=False))
    got = across(jnp.asarray(local), split_page_table(jnp.asarray(local_table), C))
    for shard in range(C):
        np.testing.assert_allclose(got[shard], want, atol=2e-6)
    assert not got[0, 0].any()  # a sequence without tokens


def naive_attention(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One query [N, H] over keys [S, K, H] whose values are their negatives; zeros where there are none."""
    out = np.zeros_like(q)
    for head in range(len(q) if len(keys) else 0):
        mine = keys[:, head // 2]
        weights = np.exp(mine @ q[head] * q.shape[1] ** -0.5)
        out[head] = -weights @ mine / weights.sum()
    return out


def test_new_tokens_are_written_by_the_shard_that_has_their_page_alone() -> None:
    rng = np.random.default_rng(1)
    lengths = jnp.asarray([5, 16], jnp.int32)
    starts = jnp.asarray([0, 3, 5], jnp.int32)  # three new tokens of the one, two of the other, one row of padding
    _, _, local, local_table = spread_pools(rng, [5, 16])
    new = jnp.asarray(rng.normal(size=(6, 2, 8)), jnp.float32)
    placed = [(0, 2), (0, 3), (0, 4), (1, 14), (1, 15)]  # sequence and position of each row
    split = split_page_table(jnp.asarray(local_table), C)

    def write(pool: Any, shard_table: Any, shard: Any) -> Any:
        own = own_page_table(shard_table, shard, C)
        return write_pages(pool, new, token_slots(own, starts, lengths, 6, PAGE, pool.shape[0]))

    written = np.asarray(jax.jit(jax.vmap(write))(jnp.asarray(local), split, jnp.arange(C)))
    for row, (b, position) in enumerate(placed):
        n = position // PAGE
        place = n % C, local_table[b, n], position % PAGE
        np.testing.assert_array_equal(written[place], new[row])
        local[place] = new[row]
    np.testing.assert_array_equal(written, local)  # and nothing else was


def merged(parts: Any, sums: Any) -> Any:
    spec = PartitionSpec("context")
    merge = jax.shard_map(
        lambda out, lse: jax.tree.map(lambda x: x[None], merge_partial(out[0], lse[0], "context")),
        mesh=mesh(),
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    return jax.jit(merge)(parts, sums)


def test_partial_results_merge_by_their_log_sum_exp() -> None:
    rng = np.random.default_rng(2)
    scores, values = rng.normal(size=(C, 5, 3, 6)) * 5, rng.normal(size=(C, 5, 3, 6, 8))  # 6 keys on each shard
    scores[0, 0], scores[1, 1:3], scores[:, 4] = -np.inf, -np.inf, -np.inf
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.exp(scores)
        parts = np.nan_to_num(np.einsum("ctnk,ctnkh->ctnh", weights, values) / weights.sum(-1)[..., None])
        lse = np.log(weights.sum(-1))
        total = weights.sum((0, -1))
        want = np.nan_to_num(np.einsum("ctnk,ctnkh->tnh", weights, values) / total[..., None])
        out, all_lse = merged(jnp.asarray(parts, jnp.float32), jnp.asarray(lse, jnp.float32))
        for shard in range(C):
            np.testing.assert_allclose(out[shard], want, atol=1e-5)
            np.testing.assert_allclose(all_lse[shard], np.log(total), atol=1e-5)
    assert np.isneginf(all_lse[0][4]).all()
