"""The decoder: embeddings, pre-norm blocks, final norm, output head; beside it, what reads images.

`model(tokens)` is causal scoring of whole sequences. `hidden` and `logits` are apart, so that nothing has to hold the
logits of a long sequence over a large vocabulary. `extend` runs the same layers over a paged cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import Implementation
from pallas_kernels.paged_attention import Implementation as PagedImplementation

from .attend import causal_attend, packed_positions, paged_attend
from .attention import Attend, Attention, Memory, Rotation
from .cache import PagedBatch, PagedCache
from .config import ModelConfig
from .feed_forward import FeedForward
from .latent_attention import LatentAttention
from .linear import projections
from .moe import MoE
from .norm import RMSNorm
from .parameters import ParameterSpec
from .sharding.collectives import gathered, lookup
from .sharding.layout import Layout, sequence_axes
from .vision import VisionEncoder
from .vision_adapter import ImageRows, PatchMerger, Vision, VisionLanguageAdapter


class Block(nnx.Module):
    """`h = x + attention(norm(x)); y = h + feed_forward(norm(h))`, of the kinds that layer number `layer` has."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, layer: int, layout: Layout | None = None) -> None:
        has_experts = config.moe is not None and layer >= config.moe.first_dense_layers
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.attention = LatentAttention(config, dtype) if config.latent else Attention(config, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.feed_forward = (
            MoE(config, dtype, layout) if has_experts else FeedForward(config.dim, config.hidden_dim, dtype)
        )

    def __call__(
        self, x: Float[Array, "*T D"], rotation: Rotation, layer: int, attend: Attend[Memory], memory: Memory
    ) -> tuple[Float[Array, "*T D"], Memory]:
        mixed, memory = self.attention(self.attention_norm(x), rotation, layer, attend, memory)
        h = x + mixed
        return h + self.feed_forward(self.ffn_norm(h)), memory


class Embedding(nnx.Module):
    """A row of numbers per vocabulary entry; as an input table and as an output head."""

    def __init__(self, vocab_size: int, dim: int, dtype: DTypeLike) -> None:
        self.weight = ParameterSpec((vocab_size, dim), ("vocab", "embed"), dtype).placeholder()

    def __call__(
        self, tokens: Int[Array, "*T"], layout: Layout | None = None, axes: tuple[str | None, ...] = ()
    ) -> Float[Array, "*T D"]:
        """The rows of `tokens`; on a mesh, `axes` are their logical axes."""
        return lookup(self.weight[...], tokens, layout, axes)

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        return jnp.einsum("...D,VD->...V", hidden, self.weight[...], preferred_element_type=jnp.float32)


class Transformer(nnx.Module):
    """A Mistral text decoder. Built abstract (no memory); fill it with `parameters.fill` or `parameters.initialize`.

    `attention` names the implementation of attention, "auto" by default (see pallas_kernels.flash_attention). `layout`
    says where weights and activations lie on a mesh; None is one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike = jnp.float32,
        *,
        attention: Implementation = "auto",
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.attention_implementation: Implementation = attention
        # cuDNN has no paged counterpart here: the choice is left to paged_attention.
        self.paged_implementation: PagedImplementation = "auto" if attention == "cudnn" else attention
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, dtype)
        self.layers = nnx.List([Block(config, dtype, layer, layout) for layer in range(config.n_layers)])
        for linear in projections(self.layers).values():
            linear.layout = layout
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = None if config.tied_embeddings else Embedding(config.vocab_size, config.dim, dtype)
        vision = config.vision
        has_norm, has_merger = (vision.pre_projector_norm, vision.patch_merge) if vision else (False, False)
        self.vision_encoder = VisionEncoder(vision, dtype) if vision else None
        self.pre_mm_projector_norm = RMSNorm(vision.dim, vision.norm_eps, dtype) if vision and has_norm else None
        self.patch_merger = PatchMerger(vision, dtype) if vision and has_merger else None
        self.vision_language_adapter = VisionLanguageAdapter(vision, config.dim, dtype) if vision else None

    @property
    def vision(self) -> Vision | None:
        """What turns patches into rows that stand in for image tokens; None for a model of text alone."""
        encoder, adapter = self.vision_encoder, self.vision_language_adapter
        if encoder is None or adapter is None:
            return None
        return Vision(encoder, self.pre_mm_projector_norm, self.patch_merger, adapter, self.attention_implementation)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of the token after each of `tokens`, from those up to it."""
        return self.logits(self.hidden(tokens))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        images: ImageRows | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm, of whole sequences from position 0.

        With packed sequences, `positions` restart and `segment_ids` differ per segment, and segments do not see
        each other. `images` has the rows [B, T, D] that stand in for the embeddings of image tokens.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        attend = causal_attend(self.config, segment_ids, self.attention_implementation, self.layout)
        return self._run(tokens, positions, sequence_axes(tokens.shape, self.layout), attend, None, images)[0]

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Float32 logits of final hidden states; on a mesh each device computes those of its part of the vocabulary."""
        head = self.tok_embeddings if self.output is None else self.output
        logits = gathered(head, self.layout).logits(hidden)
        return logits if self.layout is None else self.layout.constrain_last(logits, "act_vocab")

    def extend(
        self, tokens: Int[Array, "T"], cache: PagedCache, batch: PagedBatch, images: ImageRows | None = None
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """Runs the packed new tokens of many sequences, writing their keys and values into the cache.

        `images` has the rows [T, D] that stand in for the embeddings of image tokens. Returns the final hidden state
        of each row (meaningless for padding rows) and the cache.
        """
        n_tokens = tokens.shape[0]
        attend = paged_attend(self.config, batch, cache, n_tokens, self.paged_implementation, self.layout)
        positions = packed_positions(batch, n_tokens, self.layout)
        return self._run(tokens, positions, ("rows",), attend, cache, images)

    def _run(
        self,
        tokens: Int[Array, "*T"],
        positions: Int[Array, "*T"],
        axes: tuple[str | None, ...],
        attend: Attend[Memory],
        memory: Memory,
        images: ImageRows | None = None,
    ) -> tuple[Float[Array, "*T D"], Memory]:
        """All layers over tokens whose logical axes are `axes`."""
        layout = self.layout
        rotation = Rotation.at(positions, self.config)
        x = gathered(self.tok_embeddings, layout)(tokens, layout, axes)  # [*T, D]
        if images is not None:
            x = jnp.where(images.present[..., None], images.rows.astype(x.dtype), x)
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, memory = gathered(layer, layout)(x, rotation, i, attend, memory)
            if layout is not None:
                x = layout.constrain(x, *axes, "act_embed")
        return self.norm(x), memory
