"""The decoder: embeddings, pre-norm blocks, final norm, output head.

`model(tokens)` is causal scoring of whole sequences. `hidden` and `logits` are apart, so that nothing has to hold the
logits of a long sequence over a large vocabulary. `extend` runs the same layers over a paged cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import flash_attention, paged_attention, write_pages
from pallas_kernels.flash_attention import Implementation
from pallas_kernels.paged_attention import Implementation as PagedImplementation

from .attention import Attend, Attention, Memory, Rotation
from .cache import PagedBatch, PagedCache
from .config import ModelConfig
from .errors import NotYetError
from .feed_forward import FeedForward
from .norm import RMSNorm
from .parameters import ParameterSpec


class Block(nnx.Module):
    """`h = x + attention(norm(x)); y = h + feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike) -> None:
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.attention = Attention(config, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, dtype)

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

    def __call__(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        return self.weight[...][tokens]

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        return jnp.einsum("...D,VD->...V", hidden, self.weight[...], preferred_element_type=jnp.float32)


class Transformer(nnx.Module):
    """A Mistral text decoder. Built abstract (no memory); fill it with `parameters.fill` or `parameters.initialize`.

    `attention` names the implementation of attention, "auto" by default (see pallas_kernels.flash_attention).
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike = jnp.float32,
        *,
        attention: Implementation = "auto",
    ) -> None:
        refuse_missing_layers(config)
        self.config = config
        self.attention_implementation: Implementation = attention
        # cuDNN has no paged counterpart here: the choice is left to paged_attention.
        self.paged_implementation: PagedImplementation = "auto" if attention == "cudnn" else attention
        self.tok_embeddings = Embedding(config.vocab_size, config.dim, dtype)
        self.layers = nnx.List([Block(config, dtype) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = None if config.tied_embeddings else Embedding(config.vocab_size, config.dim, dtype)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of the token after each of `tokens`, from those up to it."""
        return self.logits(self.hidden(tokens))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states, after the last norm, of whole sequences from position 0.

        With packed sequences, `positions` restart and `segment_ids` differ per segment, and segments do not see
        each other.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

        def attend(layer: int, q: Array, k: Array, v: Array, memory: None) -> tuple[Array, None]:
            window = self.config.windows[layer]
            out = flash_attention(
                q, k, v, window=window, segment_ids=segment_ids, implementation=self.attention_implementation
            )
            return out, memory

        return self._run(tokens, positions, attend, None)[0]

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Float32 logits of final hidden states."""
        head = self.tok_embeddings if self.output is None else self.output
        return head.logits(hidden)

    def extend(
        self, tokens: Int[Array, "T"], cache: PagedCache, batch: PagedBatch
    ) -> tuple[Float[Array, "T D"], PagedCache]:
        """Runs the packed new tokens of many sequences, writing their keys and values into the cache.

        Returns the final hidden state of each row (meaningless for padding rows) and the cache.
        """
        slots = batch.slots(cache, tokens.shape[0])

        def attend(layer: int, q: Array, k: Array, v: Array, memory: PagedCache) -> tuple[Array, PagedCache]:
            group = memory.group_of_layer[layer]
            k_pages = write_pages(memory.keys[layer], k, slots[group])
            v_pages = write_pages(memory.values[layer], v, slots[group])
            out = paged_attention(
                q,
                k_pages,
                v_pages,
                batch.page_tables[group],
                batch.query_starts,
                batch.lengths,
                window=self.config.windows[layer],
                implementation=self.paged_implementation,
            )
            return out, memory.with_layer(layer, k_pages, v_pages)

        return self._run(tokens, batch.positions(tokens.shape[0]), attend, cache)

    def _run(
        self, tokens: Int[Array, "*T"], positions: Int[Array, "*T"], attend: Attend[Memory], memory: Memory
    ) -> tuple[Float[Array, "*T D"], Memory]:
        rotation = Rotation.at(positions, self.config)
        x = self.tok_embeddings(tokens)  # [*T, D]
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, memory = layer(x, rotation, i, attend, memory)
        return self.norm(x), memory


def refuse_missing_layers(config: ModelConfig) -> None:
    """Raises NotYetError for a decoder that we recognise but cannot compute."""
    if config.latent is not None:
        raise NotYetError("this model has latent attention, whose layers are not built yet")
    if config.moe is not None:
        raise NotYetError("this model is a mixture of experts, whose layers are not built yet")
