"""Mixture of experts: which experts a token goes to, and their feed-forwards. Products by group are grouped_product's.

Router arithmetic is float32. No token is ever dropped: there is no capacity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .config import ModelConfig, MoEConfig
from .feed_forward import FeedForward
from .grouped_product import by_blocks, grouped_product, has_ragged_kernel
from .linear import Linear, LowRank
from .parameters import ParameterSpec
from .quantization import LinearFormat, QuantizedProduct
from .sharding.layout import Layout

Parts = Mapping[str, Array]
ADAPTER_PARTS = ("lora_a", "lora_b")


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

    def _base(self, parts: Parts, x: Float[Array, "M I"]) -> Float[Array, "M O"]:
        if self.stored is None:
            return jnp.einsum("MI,OI->MO", x, parts["weight"])
        weight = self.stored.weight(parts)
        if self.stored.activations != "none" and isinstance(weight, QuantizedProduct):
            return weight.quantized_product(x)
        return weight.product(x)


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


class Experts(nnx.Module):
    """The SwiGLU feed-forwards of all experts, stacked: `w2(silu(w1 x) * w3 x)` with the matrices of each row's own."""

    def __init__(self, moe: MoEConfig, dim: int, dtype: DTypeLike) -> None:
        n, hidden = moe.n_experts, moe.expert_hidden_dim
        self.w1 = ExpertLinear(n, hidden, dim, ("hidden", "expert_embed"), dtype)
        self.w2 = ExpertLinear(n, dim, hidden, ("expert_embed", "hidden"), dtype)
        self.w3 = ExpertLinear(n, hidden, dim, ("hidden", "expert_embed"), dtype)

    def __call__(self, x: Float[Array, "M D"], group_sizes: Int[Array, "E"]) -> Float[Array, "M D"]:
        """Rows sorted by expert through their experts; zeros for rows past the last group."""
        linears = {"w1": self.w1, "w2": self.w2, "w3": self.w3}
        if has_ragged_kernel() and all(linear.stored is None for linear in linears.values()):
            return self.w2(jax.nn.silu(self.w1(x, group_sizes)) * self.w3(x, group_sizes), group_sizes)
        feed_forward = _ExpertFeedForward(*(linear.product for linear in linears.values()))
        trained = {name: linear.trained for name, linear in linears.items()}
        frozen = {name: linear.frozen for name, linear in linears.items()}
        return by_blocks(feed_forward, trained, frozen, x, group_sizes)


@dataclass(frozen=True)
class _ExpertFeedForward:
    """The feed-forward of one expert on its rows, from its arrays: all three products while its rows are at hand."""

    w1: Product
    w2: Product
    w3: Product

    def __call__(
        self, trained: Mapping[str, Parts], frozen: Mapping[str, Parts], x: Float[Array, "M D"]
    ) -> Float[Array, "M D"]:
        parts = {name: {**trained[name], **frozen[name]} for name in trained}
        return self.w2(parts["w2"], jax.nn.silu(self.w1(parts["w1"], x)) * self.w3(parts["w3"], x))


class MoE(nnx.Module):
    """`sum over the chosen experts of weight * expert(x)`, plus the shared expert where there is one, unweighted."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, layout: Layout | None = None) -> None:
        assert config.moe is not None, "a model without experts"
        self.moe, self.layout = config.moe, layout
        moe, dim = config.moe, config.dim
        self.gate = Router(moe.n_experts, dim, dtype)
        self.experts = Experts(moe, dim, dtype)
        shared = moe.n_shared_experts * moe.expert_hidden_dim  # all shared experts are one wide one
        self.shared_experts = FeedForward(dim, shared, dtype) if shared else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        rows = x.reshape(-1, x.shape[-1])  # [T, D]
        mixed = self._routed(rows).reshape(x.shape)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)

    def _routed(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        routing = route(self.gate(x), self.moe)
        groups = group(routing.experts, self.moe.n_experts)
        answers = self.experts(x[groups.tokens], groups.sizes)  # [M, D], sorted by expert
        return mix(answers[groups.rows], routing.weights)


def mix(answers: Float[Array, "T chosen D"], weights: Float[Array, "T chosen"]) -> Float[Array, "T D"]:
    """The weighted sum of each token's answers, in float32, rounded once."""
    return jnp.einsum("TCD,TC->TD", answers.astype(jnp.float32), weights).astype(answers.dtype)
