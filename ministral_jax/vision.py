"""The Pixtral vision tower: patches of many images in, one state per patch out. What follows it is vision_adapter.

Equations: Pixtral 12B, arXiv 2410.07073, and mistral-inference's vision_encoder.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Implementation

from .config import VisionConfig
from .linear import Linear
from .norm import RMSNorm
from .parameters import ParameterSpec
from .rope import apply_rope

# The tower is small beside its decoder: on a mesh every device has all of it.
WHOLE = ("vision", "vision")


class Patches(NamedTuple):
    """Patches of many images in one row, padding at its end; `images.pack_images` makes them.

    Patches that are merged into one token stand together, row by row within their square. `places` are the row and the
    column of each patch within its image. `images` numbers the images; padding is an image of its own.
    """

    pixels: Float[Array | np.ndarray, "T pixels"]
    places: Int[Array | np.ndarray, "T 2"]
    images: Int[Array | np.ndarray, "T"]


def rotation_2d(
    places: Int[Array, "T 2"], theta: float, head_dim: int
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosine and sine of every pair's angle: the first half of the pairs turns by the row, the second by the column.

    Of the frequencies `theta ** (-2i / H)` rows take the even ones, columns the odd ones.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    at = places.astype(jnp.float32)
    angles = jnp.concatenate(
        [
            at[:, :1] * jnp.asarray(frequencies[0::2], jnp.float32),
            at[:, 1:] * jnp.asarray(frequencies[1::2], jnp.float32),
        ],
        axis=-1,
    )  # [T, H/2]
    return jnp.cos(angles), jnp.sin(angles)


class PatchConv(nnx.Module):
    """A convolution whose kernel is as large as its stride: one product per patch, without bias."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        shape = (config.dim, config.n_channels, config.patch_size, config.patch_size)
        self.weight = ParameterSpec(shape, (*WHOLE, *WHOLE), dtype).placeholder()

    def __call__(self, pixels: Float[Array, "T pixels"]) -> Float[Array, "T D"]:
        weight = self.weight[...]
        return pixels.astype(weight.dtype) @ weight.reshape(weight.shape[0], -1).T


class VisionAttention(nnx.Module):
    """Attention of every patch to all patches of its own image and no other."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, config.dim, WHOLE, dtype)
        self.wk = Linear(config.dim, config.dim, WHOLE, dtype)
        self.wv = Linear(config.dim, config.dim, WHOLE, dtype)
        self.wo = Linear(config.dim, config.dim, WHOLE, dtype)

    def __call__(
        self,
        x: Float[Array, "T D"],
        rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
        images: Int[Array, "T"],
        implementation: Implementation,
    ) -> Float[Array, "T D"]:
        heads = (len(x), -1, self.head_dim)
        q = apply_rope(self.wq(x).reshape(heads), *rotation)  # [T, N, H]
        k = apply_rope(self.wk(x).reshape(heads), *rotation)  # [T, N, H]
        v = self.wv(x).reshape(heads)  # [T, N, H]
        # Causal attention of queries that all stand after the last key is attention in both directions.
        mixed = flash_attention(
            q[None], k[None], v[None], segment_ids=images[None], query_offset=len(x), implementation=implementation
        )
        return self.wo(mixed.reshape(x.shape))


class VisionFeedForward(nnx.Module):
    """`w2(silu(w1(x)) * w3(x))`, as in the decoder, but whole on every device."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.w1 = Linear(config.hidden_dim, config.dim, WHOLE, dtype)
        self.w2 = Linear(config.dim, config.hidden_dim, WHOLE, dtype)
        self.w3 = Linear(config.hidden_dim, config.dim, WHOLE, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.w2(jax.nn.silu(self.w1(x)) * self.w3(x))


class VisionBlock(nnx.Module):
    """`h = x + attention(norm(x)); y = h + feed_forward(norm(h))`."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.attention = VisionAttention(config, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.feed_forward = VisionFeedForward(config, dtype)

    def __call__(
        self,
        x: Float[Array, "T D"],
        rotation: tuple[Float[Array, "T half"], Float[Array, "T half"]],
        images: Int[Array, "T"],
        implementation: Implementation,
    ) -> Float[Array, "T D"]:
        h = x + self.attention(self.attention_norm(x), rotation, images, implementation)
        return h + self.feed_forward(self.ffn_norm(h))


class VisionBlocks(nnx.Module):
    """The blocks, under the name that files have for them."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.layers = nnx.List([VisionBlock(config, dtype) for _ in range(config.n_layers)])


class VisionEncoder(nnx.Module):
    """Patch embedding, norm, blocks; there is no norm after the last block."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.config = config
        self.patch_conv = PatchConv(config, dtype)
        self.ln_pre = RMSNorm(config.dim, config.norm_eps, dtype)
        self.transformer = VisionBlocks(config, dtype)

    def __call__(self, patches: Patches, implementation: Implementation = "auto") -> Float[Array, "T D"]:
        """The state of every patch after the last block; padding rows mean nothing."""
        pixels, places, images = map(jnp.asarray, patches)
        rotation = rotation_2d(places, self.config.rope_theta, self.config.head_dim)
        x = self.ln_pre(self.patch_conv(pixels))  # [T, D]
        for i, layer in enumerate(self.transformer.layers):
            with jax.named_scope(f"vision_layer_{i}"):
                x = layer(x, rotation, images, implementation)
        return x
