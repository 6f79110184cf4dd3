"""Mixture of experts: which experts a token goes to, and their feed-forwards. Products by group are grouped_product's.

Router arithmetic is float32. No token is ever dropped: there is no capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import has_grouped_fp8_kernel, has_grouped_kernel

from .config import ModelConfig, MoEConfig
from .feed_forward import FeedForward
from .grouped_product import by_blocks, fp8_product, grouped_product
from .linear import Linear, LowRank
from .parameters import ParameterSpec
from .quantization import LinearFormat
from .quantization.fp8 import BLOCK
from .sharding.expert_exchange import MAX_BUFFER_BYTES, at_their_experts
from .sharding.layout import Layout, token_axes

Parts = Mapping[str, Array]
# Of w1, w2 and w3: what gradients exist for, and what is frozen.
ExpertArrays = tuple[Mapping[str, Parts], Mapping[str, Parts]]
ADAPTER_PARTS = ("lora_a", "lora_b")
# Ranks are padded to it for kernels: the lanes of a TPU, and twice what the Hopper kernel needs.
RANK_MULTIPLE = 128


class Routing(NamedTuple):
    """The experts of each token and what their answers are multiplied by, in float32."""

    experts: Int[Array, "*T chosen"]
    weights: Float[Array, "*T chosen"]


def route(logits: Float[Array, "*T E"], moe: MoEConfig) -> Routing:
    """The `experts_per_token` largest logits, their softmax among themselves, times `routed_scale`.

    That is Mixtral's rule (mistral-inference, `moe.py`). The rule of Large 3 and Small 4, a softmax over all experts
    whose chosen weights are divided by their sum, is the same: the sum over all cancels.
    """
    chosen, experts = jax.lax.top_k(logits.astype(jnp.float32), moe.experts_per_token)
    return Routing(experts.astype(jnp.int32), jax.nn.softmax(chosen, axis=-1) * moe.routed_scale)


class Groups(NamedTuple):
    """Copies of tokens sorted by expert: row i is one of token `tokens[i]`, copy c of token t is row `rows[t, c]`."""

    tokens: Int[Array, "M"]
    rows: Int[Array, "T chosen"]
    sizes: Int[Array, "E"]


def group(experts: Int[Array, "T chosen"], n_experts: int) -> Groups:
    """The copies of T tokens, one for each of its experts, sorted by expert; tokens stay in order."""
    T, chosen = experts.shape
    flat = experts.reshape(-1)  # [M]
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    rows = jnp.zeros_like(order).at[order].set(jnp.arange(T * chosen, dtype=jnp.int32))
    return Groups(order // chosen, rows.reshape(T, chosen), jnp.bincount(flat, length=n_experts).astype(jnp.int32))


class Router(nnx.Module):
    """One logit per expert: a matrix [E, D], dense in every published format."""

    def __init__(self, n_experts: int, dim: int, dtype: DTypeLike) -> None:
        self.weight = ParameterSpec((n_experts, dim), ("rank", "embed"), dtype).placeholder()

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T E"]:
        gate = self.weight[...].astype(jnp.float32)
        return jnp.einsum("...D,ED->...E", x.astype(jnp.float32), gate, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Product:
    """The product of one expert's projection with rows, from its arrays: as `Linear` computes it."""

    stored: LinearFormat | None
    adapter: LowRank | None

    def __call__(self, parts: Parts, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        product = self._base(parts, x)
        if self.adapter is None:
            return product
        down, up = parts["lora_a"].astype(x.dtype), parts["lora_b"].astype(x.dtype)
        inner = jnp.einsum("MI,RI->MR", x, down)
        low = jnp.einsum("MR,OR->MO", inner, up, preferred_element_type=jnp.float32)
        return (product + self.adapter.scale * low).astype(product.dtype)

    def of_expert(self, trained: Parts, frozen: Parts, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        """The same, with the arrays apart."""
        return self({**trained, **frozen}, x)

    def has_kernel(self, parts: Parts, x: Float[Array, "M _"]) -> bool:
        """Whether all experts are computed at once: dense ones, or FP8 blocks met by rounded activations."""
        if self.stored is None:
            return has_grouped_kernel(x, parts["weight"])
        rounded = self.stored.format == "fp8_block" and self.stored.activations == "dynamic"
        return rounded and x.dtype == jnp.bfloat16 and has_grouped_fp8_kernel(parts["weight"])

    def of_groups(self, parts: Parts, x: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        """Of all experts at once, from their stacked arrays. What an adapter adds is rounded once more."""
        if self.stored is None:
            product = grouped_product(x, parts["weight"], group_sizes)
        else:
            product = fp8_product(x, parts["weight"], parts["weight_scale"], group_sizes)
        if self.adapter is None:
            return product
        missing = (0, -self.adapter.rank % RANK_MULTIPLE)
        down = jnp.pad(parts["lora_a"].astype(x.dtype), ((0, 0), missing, (0, 0)))
        up = jnp.pad(parts["lora_b"].astype(x.dtype), ((0, 0), (0, 0), missing))
        low = grouped_product(grouped_product(x, down, group_sizes), up, group_sizes)
        return (product + self.adapter.scale * low.astype(jnp.float32)).astype(product.dtype)

    def _base(self, parts: Parts, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        if self.stored is None:
            return x @ parts["weight"].T  # not an einsum, see grouped_product
        return self.stored.product(parts, x)


class ExpertLinear(Linear):
    """The same projection of every expert: each array of a `Linear`, with experts as a new first axis."""

    def __init__(self, n_experts: int, n_out: int, n_in: int, axes: tuple[str, str], dtype: DTypeLike) -> None:
        super().__init__(n_out, n_in, axes, dtype)
        self.n_experts = n_experts
        self.weight = self._of_all(ParameterSpec(self.shape, axes, dtype))

    def _of_all(self, spec: ParameterSpec) -> nnx.Param:
        stacked = dataclasses.replace(spec, shape=(self.n_experts, *spec.shape), axes=("expert", *spec.axes))
        return stacked.placeholder()

    def store_as(self, stored: LinearFormat) -> None:
        """Replaces the dense placeholder by those of a quantised format."""
        del self.weight
        self.stored = stored
        for name, spec in stored.specs(*self.shape, self.axes).items():
            setattr(self, name, self._of_all(spec))

    def adapt(self, adapter: LowRank) -> None:
        """Adds placeholders of an adapter for each expert: `lora_a` [E, R, in] and `lora_b` [E, out, R]."""
        n_out, n_in = self.shape
        self.adapter = adapter
        down = ParameterSpec((adapter.rank, n_in), ("rank", self.axes[1]), jnp.float32, "fan_in", adapter=True)
        up = ParameterSpec((n_out, adapter.rank), (self.axes[0], "rank"), jnp.float32, "zeros", adapter=True)
        self.lora_a, self.lora_b = self._of_all(down), self._of_all(up)

    @property
    def product(self) -> Product:
        """What one expert does with rows, given its arrays."""
        return Product(self.stored, self.adapter)

    @property
    def trained(self) -> Parts:
        """The arrays that gradients exist for: a dense weight, and an adapter."""
        names = (() if self.stored else ("weight",)) + (ADAPTER_PARTS if self.adapter else ())
        return {name: getattr(self, name)[...] for name in names}

    @property
    def frozen(self) -> Parts:
        """The payload and scales of a quantised weight."""
        names = self.stored.parts(*self.shape) if self.stored else ()
        return {name: getattr(self, name)[...] for name in names}

    def __call__(self, x: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The product of each row, sorted by expert, with its expert's matrix."""
        if self.stored is None and self.adapter is None:
            return grouped_product(x, self.weight[...], group_sizes)
        return by_blocks(self.product.of_expert, self.trained, self.frozen, x, group_sizes)


@dataclass(frozen=True)
class ExpertForm:
    """The SwiGLU feed-forward of experts, from their arrays: how each projection is stored."""

    w1: Product
    w2: Product
    w3: Product

    def of_one(
        self, trained: Mapping[str, Parts], frozen: Mapping[str, Parts], x: Float[Array, "M D"]
    ) -> Float[Array, "M D"]:
        """One expert on its rows: all three products while the rows are at hand."""
        parts = {name: {**trained[name], **frozen[name]} for name in trained}
        return self.w2(parts["w2"], jax.nn.silu(self.w1(parts["w1"], x)) * self.w3(parts["w3"], x))

    def run(self, arrays: ExpertArrays, x: Float[Array, "M D"], group_sizes: Int[Array, "E"]) -> Float[Array, "M D"]:
        """Rows sorted by expert through their experts; zeros for rows past the last group."""
        trained, frozen = arrays
        parts = {name: {**trained[name], **frozen[name]} for name in trained}
        if not all(getattr(self, name).has_kernel(parts[name], x) for name in parts):
            return by_blocks(self.of_one, trained, frozen, x, group_sizes)

        def product(name: str, x: Array) -> Array:
            return getattr(self, name).of_groups(parts[name], x, group_sizes)

        return product("w2", jax.nn.silu(product("w1", x)) * product("w3", x))


class Experts(nnx.Module):
    """The feed-forwards of all experts, stacked: `w2(silu(w1 x) * w3 x)` with the matrices of each row's own."""

    def __init__(self, moe: MoEConfig, dim: int, dtype: DTypeLike) -> None:
        n, hidden = moe.n_experts, moe.expert_hidden_dim
        self.w1 = ExpertLinear(n, hidden, dim, ("hidden", "expert_embed"), dtype)
        self.w2 = ExpertLinear(n, dim, hidden, ("expert_embed", "hidden"), dtype)
        self.w3 = ExpertLinear(n, hidden, dim, ("hidden", "expert_embed"), dtype)

    @property
    def form(self) -> ExpertForm:
        return ExpertForm(self.w1.product, self.w2.product, self.w3.product)

    @property
    def arrays(self) -> ExpertArrays:
        """What gradients exist for, and what is frozen, of each projection."""
        linears = {"w1": self.w1, "w2": self.w2, "w3": self.w3}
        return tuple({name: getattr(w, kind) for name, w in linears.items()} for kind in ("trained", "frozen"))  # pyright: ignore[reportReturnType]

    def axes(self, *, split_hidden: bool) -> Any:
        """Logical axes of `arrays` as they are used: whole along the model's width."""

        def used(parameter: nnx.Param) -> tuple[str | None, ...]:
            axes = parameter.axes[-parameter.get_value().ndim :]  # a scan has taken the layers' axis away
            return tuple(axis if axis == "expert" or (split_hidden and axis == "hidden") else None for axis in axes)

        linears = {"w1": self.w1, "w2": self.w2, "w3": self.w3}
        return tuple(
            {name: {part: used(getattr(w, part)) for part in getattr(w, kind)} for name, w in linears.items()}
            for kind in ("trained", "frozen")
        )

    def __call__(self, x: Float[Array, "M D"], group_sizes: Int[Array, "E"]) -> Float[Array, "M D"]:
        """Rows sorted by expert through their experts; zeros for rows past the last group."""
        return self.form.run(self.arrays, x, group_sizes)


class MoE(nnx.Module):
    """`sum over the chosen experts of weight * expert(x)`, plus the shared expert where there is one, unweighted.

    With `layout`, experts lie along the mesh axis `expert` and their hidden width along `tensor` (see _on_mesh).
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, layout: Layout | None = None) -> None:
        assert config.moe is not None, "a model without experts"
        self.moe, self.layout = config.moe, layout
        moe, dim = config.moe, config.dim
        self.gate = Router(moe.n_experts, dim, dtype)
        self.experts = Experts(moe, dim, dtype)
        shared = moe.n_shared_experts * moe.expert_hidden_dim  # all shared experts are one wide one
        self.shared_experts = FeedForward(dim, shared, dtype) if shared else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        mixed = self._on_one_device(x) if self.layout is None else self._on_mesh(x, self.layout)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)

    def _on_one_device(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        rows = x.reshape(-1, x.shape[-1])  # [T, D]
        routing = route(self.gate(rows), self.moe)
        groups = group(routing.experts, self.moe.n_experts)
        answers = self.experts(rows[groups.tokens], groups.sizes)  # [M, D], sorted by expert
        return mix(answers[groups.rows], routing.weights).reshape(x.shape)

    def _on_mesh(self, x: Float[Array, "*T D"], layout: Layout) -> Float[Array, "*T D"]:
        """Every device with its own tokens, experts, and part of the hidden width.

        Tokens that are split along `expert` travel to their experts and back. Where they are not, each device has them
        all and answers for its own experts; the answers are added.
        """
        axes = token_axes(x.shape[:-1], layout)
        ways, experts_along = layout.ways("expert"), layout.along("expert")
        travels = ways > 1 and set(experts_along) <= set(layout.along(axes[0]) if axes[0] else ())
        split_hidden = self._hidden_divides(layout)
        added = (layout.along("hidden") if split_hidden else ()) + (() if travels else experts_along)
        moe, form = self.moe, self.experts.form

        def local(x: Array, logits: Array, arrays: ExpertArrays) -> Array:
            rows = x.reshape(-1, x.shape[-1])  # [T, D] of this device
            routing = route(logits.reshape(len(rows), -1), moe)
            if travels:
                mixed = _mixed_by_travel(partial(form.run, arrays), rows, routing, moe, *experts_along)
            else:
                first = lax.axis_index(experts_along) * (moe.n_experts // ways) if ways > 1 else 0
                mixed = _mixed_here(partial(form.run, arrays), rows, routing, first, moe.n_experts // ways)
            return (lax.psum(mixed, added) if added else mixed).reshape(x.shape)

        tokens, parts = layout.spec((*axes, None)), self.experts.axes(split_hidden=split_hidden)
        is_axes = lambda leaf: isinstance(leaf, tuple) and all(isinstance(axis, str | None) for axis in leaf)  # noqa: E731
        return jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(tokens, tokens, jax.tree.map(layout.spec, parts, is_leaf=is_axes)),
            out_specs=tokens,
            check_vma=False,
        )(x, self.gate(x), self.experts.arrays)

    def _hidden_divides(self, layout: Layout) -> bool:
        """Whether the hidden width is split: not where that would cut the blocks that a quantised weight scales."""
        ways = layout.ways("hidden")
        quantized = any(w.stored is not None for w in (self.experts.w1, self.experts.w2, self.experts.w3))
        return ways > 1 and self.moe.expert_hidden_dim % (ways * (BLOCK if quantized else 1)) == 0


def _mixed_here(
    run: Callable[[Array, Array], Array], rows: Float[Array, "T D"], routing: Routing, first: Any, n_experts: int
) -> Float[Array, "T D"]:
    """The weighted answers of `n_experts` experts from number `first` on, to all tokens."""
    own = routing.experts - first
    groups = group(jnp.where((own >= 0) & (own < n_experts), own, n_experts), n_experts + 1)
    answers = run(rows[groups.tokens], groups.sizes[:n_experts])  # zeros for copies that are not of these experts
    return mix(answers[groups.rows], routing.weights)


def _mixed_by_travel(
    run: Callable[[Array, Array], Array], rows: Float[Array, "T D"], routing: Routing, moe: MoEConfig, axis: str
) -> Float[Array, "T D"]:
    """The weighted answers of all experts, wherever they are, to this device's tokens, some tokens at a time."""
    n_devices = lax.axis_size(axis)
    copies = n_devices * min(moe.experts_per_token, moe.n_experts // n_devices)  # of a token a device, at most
    rounds = -(-len(rows) * copies * rows.shape[1] * rows.dtype.itemsize // MAX_BUFFER_BYTES)
    rounds = next(r for r in range(max(rounds, 1), len(rows) + 1) if len(rows) % r == 0)

    def one_round(part: tuple[Array, Routing]) -> Array:
        rows, routing = part
        groups = group(routing.experts, moe.n_experts)
        room = len(rows) * copies
        answers = at_their_experts(run, rows[groups.tokens], groups.sizes, axis, room)
        return mix(answers[groups.rows], routing.weights)

    if rounds == 1:
        return one_round((rows, routing))
    parts = jax.tree.map(lambda array: array.reshape(rounds, -1, *array.shape[1:]), (rows, routing))
    return lax.map(one_round, parts).reshape(rows.shape)


def mix(answers: Float[Array, "T chosen D"], weights: Float[Array, "T chosen"]) -> Float[Array, "T D"]:
    """The weighted sum of each token's answers, in float32, rounded once."""
    return jnp.einsum("TCD,TC->TD", answers.astype(jnp.float32), weights).astype(answers.dtype)
