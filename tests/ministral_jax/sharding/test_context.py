"""Context parallelism against one device: outputs, gradients, and what goes over the wires."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from benchmarks.collective_traffic import traffic
from ministral_jax.errors import ShardingError
from ministral_jax.sharding import halo, ring
from ministral_jax.sharding.context import Split, context_flash_attention, context_order, context_positions
from ministral_jax.sharding.merge import Partial
from pallas_kernels import flash_attention

B, N, K, H, HV = 2, 4, 2, 8, 16
# Programs of a few operations that run once: most of the time would go into optimising their machine code.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Case(NamedTuple):
    """Sequences of T tokens over C shards."""

    C: int
    window: int | None
    split: Split = "contiguous"
    T: int = 32
    segmented: bool = True
    dtype: Any = jnp.float32
    implementation: Any = "reference"
    interpret: bool = False

    def arrays(self) -> list[jax.Array]:
        """q, k, v and the gradient of the output, tokens in the order of the split."""
        rng = np.random.default_rng(0)
        order = context_order(self.T, self.C, self.split)
        shapes = (N, H), (K, H), (K, HV), (N, HV)
        return [jnp.asarray(rng.normal(size=(B, self.T, *shape))[:, order], self.dtype) for shape in shapes]

    def segments(self) -> jax.Array | None:
        """Ids in the order of the split; no border falls on that of a shard."""
        if not self.segmented:
            return None
        ids = np.repeat([[0, 1, 2, 3], [1, 1, 1, 7]], [5, self.T // 2, 3, self.T // 2 - 8], axis=1)
        return jnp.asarray(ids[:, context_order(self.T, self.C, self.split)], jnp.int32)

    def on_one_device(self) -> list[np.ndarray]:
        """Output and gradients by the definition, tokens in the order of the split."""
        results = by_definition(self._replace(C=1, split="contiguous", implementation="reference", interpret=False))
        return [x[:, context_order(self.T, self.C, self.split)] for x in results]

    def attention(self, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Callable[..., Any]:
        """The split attention of q, k, v and ids, over whole arrays."""
        ids_spec = PartitionSpec(*spec[:2])
        return jax.shard_map(
            functools.partial(self._local),
            mesh=mesh,
            in_specs=(spec, spec, spec, ids_spec),
            out_specs=spec,
            check_vma=False,
        )

    def _local(self, q: Any, k: Any, v: Any, ids: Any) -> Any:
        return context_flash_attention(
            q,
            k,
            v,
            axis_name="context",
            window=self.window,
            segment_ids=ids,
            scale=0.5,
            split=self.split,
            implementation=self.implementation,
            interpret=self.interpret,
        )

    def compiled(self, mesh: jax.sharding.Mesh | None = None, gradients: bool = True) -> jax.stages.Compiled:
        """A program of q, k, v, d_out, giving the output and, if asked, the gradients of q, k and v."""
        mesh = mesh_of(context=self.C) if mesh is None else mesh
        spec = PartitionSpec(*("data" if "data" in mesh.shape else None, "context"),
                             "tensor" if "tensor" in mesh.shape else None)  # fmt: skip
        attend, ids = self.attention(mesh, spec), self.segments()

        def results(q: Any, k: Any, v: Any, d_out: Any) -> Any:
            if not gradients:
                return [attend(q, k, v, ids)]
            out, pull = jax.vjp(lambda *operands: attend(*operands, ids), q, k, v)
            return [out, *pull(d_out)]

        where = jax.sharding.NamedSharding(mesh, spec)
        staged = jax.jit(results, in_shardings=where, out_shardings=where)
        return staged.lower(*self.arrays()).compile(compiler_options=QUICKLY)

    def across(self, program: jax.stages.Compiled) -> list[np.ndarray]:
        """What the program gives."""
        operands = jax.device_put(tuple(self.arrays()), program.input_shardings[0])
        return [np.asarray(x, np.float32) for x in program(*operands)]


@functools.cache
def by_definition(case: Case) -> list[np.ndarray]:
    """Output and gradients on one device, tokens in their order."""
    ids = case.segments()

    @jax.jit
    def results(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(q, k, v, window=case.window, segment_ids=ids, implementation="reference", scale=0.5)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    program = results.lower(*case.arrays()).compile(compiler_options=QUICKLY)
    return [np.asarray(x, np.float32) for x in program(*case.arrays())]


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    n = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:n], axis_types=(AxisType.Auto,) * len(sizes)
    )


def furthest(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The largest difference as a share of the range, over all results."""
    assert len(got) <= len(want)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in zip(got, want, strict=False))


def check(case: Case, program: jax.stages.Compiled | None = None) -> None:
    tolerance = 1e-5 if case.dtype == jnp.float32 else 0.02
    assert furthest(case.across(program or case.compiled()), case.on_one_device()) < tolerance


# Of one token: its keys and values, and with them its segment ids.
KEY_BYTES = B * K * (H + HV) * 4
VISITOR_BYTES = KEY_BYTES + B * 4


def check_ring_traffic(program: jax.stages.Compiled, *, tokens: int, receivers: int, shards: int) -> None:
    """Permutations alone: keys and ids come C - 1 times in each pass, float32 sums of gradients C times.

    `receivers` of each transfer that is not closed. A compiler may keep the first block that came for the second pass.
    """
    sent = traffic(program)
    assert {x.name for x in sent} == {"collective-permute"}
    hop = receivers * tokens * VISITOR_BYTES
    sums = shards * shards * tokens * KEY_BYTES
    assert sum(x.total for x in sent) - sums in (2 * (shards - 1) * hop, (2 * (shards - 1) - 1) * hop), sent


def test_windows_are_fetched_from_neighbours_and_nothing_else_moves() -> None:
    case = Case(C=4, window=11)  # runs of 8 tokens: the halo of 10 takes two hops
    program = case.compiled(mesh_of(context=4, tensor=2))
    check(case, program)
    received = sum(min(10, 8 * shard) for shard in range(4))
    sent = traffic(program)
    assert Counter(x.name for x in sent) == {"collective-permute": 10}  # k, v and ids in two hops, gradients back
    ids_twice = received * B * 4  # each device of the tensor axis has all ids
    assert sum(x.total for x in sent) == received * (KEY_BYTES + VISITOR_BYTES) + ids_twice


def test_the_ring_passes_each_block_on_and_brings_its_gradients_home() -> None:
    case = Case(C=4, window=None)
    program = case.compiled()
    check(case, program)
    check_ring_traffic(program, tokens=8, receivers=3, shards=4)


def test_a_zigzag_ring_is_closed_and_data_are_split_beside_it() -> None:
    case = Case(C=4, window=None, split="zigzag")
    program = case.compiled(mesh_of(data=2, context=4))
    check(case, program)
    check_ring_traffic(program, tokens=8, receivers=4, shards=4)


def test_zigzag_halos_come_from_both_sides() -> None:
    check(Case(C=4, window=11, split="zigzag"))  # runs of 4 tokens: three hops, round the turn of the zigzag


def test_a_window_of_one_moves_nothing() -> None:
    case = Case(C=2, window=1)
    program = case.compiled(gradients=False)
    assert not traffic(program)
    (out,) = case.across(program)
    np.testing.assert_allclose(out, np.repeat(case.arrays()[2], N // K, axis=2), rtol=1e-6)


@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
def test_a_halo_that_is_one_key_short_is_noticed(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = halo.halo_rows
    monkeypatch.setattr(halo, "halo_rows", lambda *arguments: whole(*arguments) - 1)
    case = Case(C=2, window=11, split=split)
    assert furthest(case.across(case.compiled(gradients=False)), case.on_one_device()) > 0.01


def test_a_halo_of_the_first_shard_that_is_zero_instead_of_absent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halo, "missing_rows", lambda *arguments: 0)
    case = Case(C=2, window=11)
    assert furthest(case.across(case.compiled(gradients=False)), case.on_one_device()) > 0.01


def test_parts_that_are_averaged_without_their_log_sum_exp_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(a: Partial, b: Partial) -> Partial:
        return Partial((a.out + b.out) / 2, jnp.maximum(a.lse, b.lse))

    monkeypatch.setattr(ring, "combined", mean)
    case = Case(C=2, window=None)
    assert furthest(case.across(case.compiled(gradients=False)), case.on_one_device()) > 0.01


def test_positions_and_order_say_where_tokens_stand() -> None:
    assert context_order(8, 2).tolist() == list(range(8))
    assert context_order(8, 2, "zigzag").tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    splits: tuple[Split, ...] = ("contiguous", "zigzag")
    for split in splits:
        positions = jax.jit(
            jax.shard_map(
                lambda split=split: context_positions(4, "context", split),
                mesh=mesh_of(context=4),
                in_specs=(),
                out_specs=PartitionSpec("context"),
                check_vma=False,
            )
        )()
        assert positions.tolist() == context_order(16, 4, split).tolist()


def test_lengths_that_do_not_divide_are_refused_in_one_line() -> None:
    with pytest.raises(ShardingError, match=r"^12 tokens do not divide into 8 runs for 4 shards, split='zigzag'$"):
        context_order(12, 4, "zigzag")
    attend = Case(C=2, window=None, split="zigzag", T=8)
    operands = [x[:, :6] for x in attend.arrays()[:3]]
    with pytest.raises(ShardingError, match="a shard of 'context' holds 3 tokens: expected an even number"):
        jax.eval_shape(attend.attention(mesh_of(context=2), PartitionSpec(None, "context")), *operands, None)


@pytest.mark.long
@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("C", "window"), [(2, 31), (2, None), (8, 2), (8, 5), (8, 31), (8, 32), (8, None)])
def test_every_window_equals_one_device(C: int, window: int | None, split: Split) -> None:
    check(Case(C=C, window=window, split=split, segmented=False))


@pytest.mark.long
@pytest.mark.parametrize("split", ["contiguous", "zigzag"])
@pytest.mark.parametrize("window", [11, None])
@pytest.mark.parametrize(("implementation", "dtype"), [("xla", jnp.bfloat16), ("pallas_tpu", jnp.float32)])
def test_the_kernels_serve_it(implementation: str, dtype: Any, window: int | None, split: Split) -> None:
    interpret = implementation == "pallas_tpu"
    check(Case(C=4, window=window, split=split, dtype=dtype, implementation=implementation, interpret=interpret))
