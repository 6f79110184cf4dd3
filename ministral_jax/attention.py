"""Grouped-query attention of one layer: projections and rotation. Where keys come from is the caller's `attend`."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .config import ModelConfig, TemperatureConfig
from .linear import Linear
from .rope import apply_rope, rotation

Memory = TypeVar("Memory")


@runtime_checkable
class Attend(Protocol[Memory]):
    """How queries meet keys: over the sequence at hand, or through a cache that is handed on as `memory`.

    `v` None means that the values are the first columns of the keys, as a cache of latents has them.
    """

    def __call__(
        self,
        layer: int,
        q: Float[Array, "*T N H"],
        k: Float[Array, "*T K H"],
        v: Float[Array, "*T K Hv"] | None,
        memory: Memory,
    ) -> tuple[Float[Array, "*T N Hv"], Memory]: ...


class Rotation(NamedTuple):
    """What positions do to queries and keys; the same for every layer, so computed once per call."""

    cos: Float[Array, "*T half"]
    sin: Float[Array, "*T half"]
    temperature: Float[Array, "*T"] | None

    @staticmethod
    def at(positions: Int[Array, "*T"], config: ModelConfig) -> Rotation:
        turned = config.latent.rope_head_dim if config.latent else config.head_dim
        cos, sin = rotation(positions, config.rope, turned)
        scale = None if config.temperature is None else attention_temperature(positions, config.temperature)
        return Rotation(cos, sin, scale)


def attention_temperature(positions: Int[Array, "*T"], temperature: TemperatureConfig) -> Float[Array, "*T"]:
    """Factor of the rotated query at absolute `positions`: `1 + beta * ln(1 + floor(position / original_length))`.

    Float32, as in Llama 4; it is exactly 1 within the original length.
    """
    periods = (positions // temperature.original_length).astype(jnp.float32)
    return 1.0 + temperature.beta * jnp.log1p(periods)


class Attention(nnx.Module):
    """wq, wk, wv, wo, with queries and keys rotated by their positions."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        self.head_dim = config.head_dim
        n_q, n_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(n_q, config.dim, ("heads", "embed"), dtype)
        self.wk = Linear(n_kv, config.dim, ("kv_heads", "embed"), dtype)
        self.wv = Linear(n_kv, config.dim, ("kv_heads", "embed"), dtype)
        self.wo = Linear(config.dim, n_q, ("embed", "heads"), dtype)

    def __call__(
        self, x: Float[Array, "*T D"], rotation: Rotation, layer: int, attend: Attend[Memory], memory: Memory
    ) -> tuple[Float[Array, "*T D"], Memory]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = apply_rope(self.wq(x).reshape(heads), rotation.cos, rotation.sin)  # [*T, N, H]
        k = apply_rope(self.wk(x).reshape(heads), rotation.cos, rotation.sin)  # [*T, K, H]
        v = self.wv(x).reshape(heads)  # [*T, K, H]
        if rotation.temperature is not None:
            q = q * rotation.temperature[..., None, None].astype(q.dtype)
        mixed, memory = attend(layer, q, k, v, memory)  # [*T, N, H]
        return self.wo(mixed.reshape(*x.shape[:-1], -1)), memory
