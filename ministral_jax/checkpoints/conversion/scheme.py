"""What of a model is quantised in each format, and how the config of either layout says so. Computes nothing.

What published quantised checkpoints leave dense stays so: embeddings, norms, output head, vision, the routers of
experts, and of latent attention what DENSE_LATENT has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...config import ModelConfig, QuantizationConfig
from ...config_files import Layout
from ...config_files.quantization_block import NF4_METHOD
from ...quantization import LinearFormat
from ...quantization.formats import DENSE_LATENT, LATENT_PROJECTIONS

# What compressed-tensors is to leave alone, in the words of each layout's runtime. vLLM gives the modules of latent
# attention the names of the HF layout in both.
_VISION: Mapping[Layout, tuple[str, ...]] = {
    "hf": ("re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
    "mistral": ("re:.*vision_encoder.*", "re:.*vision_language_adapter.*", "re:.*patch_merger.*"),
}
_ROUTERS = ("re:.*gate$",)
_FIRST_LATENT: Mapping[Layout, tuple[str, ...]] = {
    "hf": ("re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$"),
    "mistral": ("re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$", "re:.*wq_a$", "re:.*wkv_a_with_mqa$"),
}
_ALL_LATENT = ("re:.*self_attn.*", "re:.*attention.*")


def quantized_modules(stored: LinearFormat, config: ModelConfig) -> re.Pattern[str]:
    """The modules that are quantised, by their canonical names."""
    attention = ["wq", "wk", "wv", "wo"]
    if config.latent is not None:
        attention = [part for part in LATENT_PROJECTIONS if part not in DENSE_LATENT[stored.format]]
    feed_forward = r"(feed_forward|(feed_forward\.)?(experts\.[0-9]+|shared_experts))\.w[123]"
    return re.compile(rf"layers\.[0-9]+\.(attention\.({'|'.join(attention) or '(?!)'})|{feed_forward})")


def quantization_config(stored: LinearFormat, layout: Layout, config: ModelConfig) -> QuantizationConfig:
    """How the config of `layout` says that the projections are `stored`."""
    activations: Any = stored.activations
    if stored.format == "nf4":
        raw: dict[str, Any] = {"quant_method": NF4_METHOD, "block_size": 64, "double_quantization": stored.double}
        return QuantizationConfig(format="nf4", activations="none", raw=raw)
    if stored.format == "fp8_tensor" and layout == "mistral":
        return QuantizationConfig(format=stored.format, activations=activations)
    block = compressed_block(stored, _ignored(stored, layout, config))
    return QuantizationConfig(format=stored.format, activations=activations, raw=block)


def _ignored(stored: LinearFormat, layout: Layout, config: ModelConfig) -> list[str]:
    ignored = ["lm_head"]
    if config.moe is not None:
        ignored += _ROUTERS
    if config.latent is not None and DENSE_LATENT[stored.format]:
        ignored += _ALL_LATENT if DENSE_LATENT[stored.format] == LATENT_PROJECTIONS else _FIRST_LATENT[layout]
    return [*ignored, *(_VISION[layout] if config.vision else ())]


def compressed_block(stored: LinearFormat, ignore: list[str]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    four, kind = stored.format == "nvfp4", "int" if stored.format == "int8_channel" else "float"
    base: dict[str, Any] = {"num_bits": 4 if four else 8, "type": kind, "symmetric": True}
    dynamic = stored.activations == "dynamic"
    if four:
        base |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        weights, inputs = {**base, "dynamic": False}, {**base, "dynamic": "local"}
    elif stored.format == "fp8_block":
        weights = {**base, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
        inputs = {**base, "strategy": "group", "group_size": 128, "dynamic": True}
    else:
        weights = {**base, "strategy": "tensor" if stored.format == "fp8_tensor" else "channel", "dynamic": False}
        inputs = {**base, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    formats = {"int8_channel": "int-quantized", "nvfp4": "nvfp4-pack-quantized"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None if stored.activations == "none" else inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.get(stored.format, "float-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
