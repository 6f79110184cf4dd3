"""Latent attention of one layer (DeepSeek-V2, arXiv 2405.04434, section 2.1), as Mistral Large 3 and Small 4 have it.

Over whole sequences in its expanded form: keys and values of every head, made from the latent. Over a cache in its
absorbed form: the cache keeps the normed latent and the one rotated key of each token, `kv_rank + rope_head_dim`
numbers, and the matrix that would expand them acts on queries and answers instead. Both are the same function.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .attention import Attend, Memory, Rotation
from .config import ModelConfig
from .linear import Linear
from .norm import RMSNorm
from .rope import apply_rope


class LatentAttention(nnx.Module):
    """wq_a, wq_b: low-rank queries; wkv_a_with_mqa, wkv_b: keys and values from a latent; wo.

    A head of queries and keys is `[nope_head_dim | rope_head_dim]`; the rotated part of the key is one for all heads.
    Scores are scaled by `head_dim ** -0.5` alone, whatever YaRN's factor, and the temperature multiplies all of q.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        assert config.latent is not None, "a model without latent attention"
        self.latent = latent = config.latent
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        n, v = config.n_heads, latent.v_head_dim
        self.wq_a = Linear(latent.q_rank, config.dim, ("rank", "embed"), dtype)
        self.q_a_norm = RMSNorm(latent.q_rank, config.norm_eps, dtype)
        self.wq_b = Linear(n * config.head_dim, latent.q_rank, ("heads", "rank"), dtype)
        self.wkv_a_with_mqa = Linear(latent.kv_rank + latent.rope_head_dim, config.dim, ("rank", "embed"), dtype)
        self.kv_a_norm = RMSNorm(latent.kv_rank, config.norm_eps, dtype)
        self.wkv_b = Linear(n * (latent.nope_head_dim + v), latent.kv_rank, ("heads", "rank"), dtype)
        self.wo = Linear(config.dim, n * v, ("embed", "heads"), dtype)

    def __call__(
        self, x: Float[Array, "*T D"], rotation: Rotation, layer: int, attend: Attend[Memory], memory: Memory
    ) -> tuple[Float[Array, "*T D"], Memory]:
        """With a cache as `memory` in the absorbed form, without one in the expanded form."""
        q = self._queries(x, rotation)  # [*T, N, nope + rope]
        latent, k_rope = self._latent(x, rotation)  # [*T, kv_rank], [*T, rope]
        form = self._expanded if memory is None else self._absorbed
        mixed, memory = form(q, latent, k_rope, layer, attend, memory)  # [*T, N, v]
        return self.wo(mixed.reshape(*x.shape[:-1], -1)), memory

    def _queries(self, x: Float[Array, "*T D"], rotation: Rotation) -> Float[Array, "*T N H"]:
        q = self.wq_b(self.q_a_norm(self.wq_a(x))).reshape(*x.shape[:-1], self.n_heads, self.head_dim)
        nope, rope = jnp.split(q, [self.latent.nope_head_dim], axis=-1)
        q = jnp.concatenate([nope, apply_rope(_half_split(rope), rotation.cos, rotation.sin)], axis=-1)
        if rotation.temperature is not None:
            q = q * rotation.temperature[..., None, None].astype(q.dtype)
        return q

    def _latent(
        self, x: Float[Array, "*T D"], rotation: Rotation
    ) -> tuple[Float[Array, "*T kv_rank"], Float[Array, "*T rope"]]:
        """What a cache keeps of each token: the latent after its norm and the shared key after its rotation."""
        latent, k_rope = jnp.split(self.wkv_a_with_mqa(x), [self.latent.kv_rank], axis=-1)
        turned = apply_rope(_half_split(k_rope)[..., None, :], rotation.cos, rotation.sin)
        return self.kv_a_norm(latent), turned[..., 0, :]

    def _expanded(
        self,
        q: Float[Array, "*T N H"],
        latent: Float[Array, "*T kv_rank"],
        k_rope: Float[Array, "*T rope"],
        layer: int,
        attend: Attend[Memory],
        memory: Memory,
    ) -> tuple[Float[Array, "*T N v"], Memory]:
        heads = self.wkv_b(latent).reshape(*latent.shape[:-1], self.n_heads, -1)  # [*T, N, nope + v]
        k_nope, v = jnp.split(heads, [self.latent.nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(k_rope[..., None, :], (*k_nope.shape[:-1], k_rope.shape[-1]))
        return attend(layer, q, jnp.concatenate([k_nope, shared], axis=-1), v, memory)

    def _absorbed(
        self,
        q: Float[Array, "*T N H"],
        latent: Float[Array, "*T kv_rank"],
        k_rope: Float[Array, "*T rope"],
        layer: int,
        attend: Attend[Memory],
        memory: Memory,
    ) -> tuple[Float[Array, "*T N v"], Memory]:
        """Scores are `(W_k^T q_nope) . latent + q_rope . k_rope`; the answer is W_v times the mixed latents."""
        expand = self.wkv_b.matrix(q.dtype).reshape(self.n_heads, -1, self.latent.kv_rank)  # [N, nope + v, kv_rank]
        to_keys, to_values = jnp.split(expand, [self.latent.nope_head_dim], axis=1)
        q_nope, q_rope = jnp.split(q, [self.latent.nope_head_dim], axis=-1)
        q = jnp.concatenate([jnp.einsum("...NH,NHR->...NR", q_nope, to_keys), q_rope], axis=-1)
        rows = jnp.concatenate([latent, k_rope], axis=-1)[..., None, :]  # [*T, 1, kv_rank + rope]
        mixed, memory = attend(layer, q, rows, None, memory)  # [*T, N, kv_rank]
        return jnp.einsum("...NR,NVR->...NV", mixed, to_values), memory


def _half_split(x: Float[Array, "*T H"]) -> Float[Array, "*T H"]:
    """Heads whose adjacent numbers turn together, as published, in the order that `apply_rope` turns.

    Queries and keys are both reordered, so that their products stay what they are.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)  # [*T, H/2, 2]
    return pairs.swapaxes(-1, -2).reshape(x.shape)
