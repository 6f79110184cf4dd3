"""Every module with a weight that a model of some config has, and the weight's shape. Knows canonical names only.

Unlike the specs of a built model this covers models whose layers are not built yet. Shapes are those of the published
configurations: dense, Mixtral, latent attention with experts (Large 3, Small 4), vision tower and projector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...config import ModelConfig, VisionConfig

Module = tuple[str, tuple[int, ...]]
HEAD = "output"


def modules(config: ModelConfig) -> Iterator[Module]:
    """Module and shape of its weight as `[out, in]`, in the order files are written; one at a time, for config may lie.

    The output head is among them whether the config ties it or not.
    """
    yield "tok_embeddings", (config.vocab_size, config.dim)
    for layer in range(config.n_layers):
        for module, shape in _layer(config, layer, config.moe.n_experts if config.moe else 0):
            yield f"layers.{layer}.{module}", shape
    yield "norm", (config.dim,)
    yield HEAD, (config.vocab_size, config.dim)
    if config.vision:
        yield from _vision(config.vision, config.dim)


def module_shape(module: str, config: ModelConfig) -> tuple[int, ...] | None:
    """The shape of the weight of one text layer's module; None for a module that the model has not."""
    found = re.fullmatch(r"layers\.([0-9]+)\.(.+)", module)
    if not found or int(found[1]) >= config.n_layers:
        return None
    expert = re.search(r"(?<=experts\.)[0-9]+", found[2])
    if expert and config.moe and int(expert[0]) >= config.moe.n_experts:
        return None
    first = re.sub(r"(?<=experts\.)[0-9]+", "0", found[2])  # all experts are alike
    return dict(_layer(config, int(found[1]), 1)).get(first)


def _layer(config: ModelConfig, layer: int, n_experts: int) -> Iterator[Module]:
    dim, moe = config.dim, config.moe
    yield from _latent(config) if config.latent else _attention(config)
    yield "attention_norm", (dim,)
    yield "ffn_norm", (dim,)
    if moe is None or layer < moe.first_dense_layers:
        yield from _feed_forward("feed_forward", dim, config.hidden_dim)
        return
    # Beside latent attention the experts hang under the layer, else under its feed-forward.
    prefix = "" if config.latent else "feed_forward."
    yield f"{prefix}gate", (moe.n_experts, dim)
    for expert in range(n_experts):
        yield from _feed_forward(f"{prefix}experts.{expert}", dim, moe.expert_hidden_dim)
    if moe.n_shared_experts:
        yield from _feed_forward(f"{prefix}shared_experts", dim, moe.expert_hidden_dim * moe.n_shared_experts)


def _attention(config: ModelConfig) -> Iterator[Module]:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "attention.wq", (queries, config.dim)
    yield "attention.wk", (keys, config.dim)
    yield "attention.wv", (keys, config.dim)
    yield "attention.wo", (config.dim, queries)


def _latent(config: ModelConfig) -> Iterator[Module]:
    latent = config.latent
    assert latent is not None
    n, dim = config.n_heads, config.dim
    yield "attention.wq_a", (latent.q_rank, dim)
    yield "attention.q_a_norm", (latent.q_rank,)
    yield "attention.wq_b", (n * (latent.nope_head_dim + latent.rope_head_dim), latent.q_rank)
    yield "attention.wkv_a_with_mqa", (latent.kv_rank + latent.rope_head_dim, dim)
    yield "attention.kv_a_norm", (latent.kv_rank,)
    yield "attention.wkv_b", (n * (latent.nope_head_dim + latent.v_head_dim), latent.kv_rank)
    yield "attention.wo", (dim, n * latent.v_head_dim)


def _feed_forward(name: str, dim: int, hidden: int) -> Iterator[Module]:
    yield f"{name}.w1", (hidden, dim)
    yield f"{name}.w2", (dim, hidden)
    yield f"{name}.w3", (hidden, dim)


def _vision(vision: VisionConfig, dim: int) -> Iterator[Module]:
    tower, width = "vision_encoder", vision.dim
    yield f"{tower}.patch_conv", (width, vision.n_channels, vision.patch_size, vision.patch_size)
    yield f"{tower}.ln_pre", (width,)
    for layer in range(vision.n_layers):
        prefix = f"{tower}.transformer.layers.{layer}"
        for part in ("wq", "wk", "wv", "wo"):
            yield f"{prefix}.attention.{part}", (width, width)
        yield f"{prefix}.attention_norm", (width,)
        yield f"{prefix}.ffn_norm", (width,)
        yield from _feed_forward(f"{prefix}.feed_forward", width, vision.hidden_dim)
    if vision.pre_projector_norm:
        yield "pre_mm_projector_norm", (width,)
    if vision.patch_merge:
        yield "patch_merger.merging_layer", (width, width * vision.spatial_merge_size**2)
    yield "vision_language_adapter.w_in", (dim, width)
    yield "vision_language_adapter.w_out", (dim, dim)


def interleaved_heads(module: str, config: ModelConfig) -> int | None:
    """Heads of a module whose output rows differ between the layouts; None for those that have one order in both."""
    part = module.rsplit(".", 1)[-1]
    if not module.endswith((".attention.wq", ".attention.wk")):
        return None
    if module.startswith("vision_encoder."):
        return config.vision.n_heads if config.vision else None
    if config.latent is not None:
        return None
    return config.n_heads if part == "wq" else config.n_kv_heads
