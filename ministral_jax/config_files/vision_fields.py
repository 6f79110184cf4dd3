"""The Pixtral vision tower and its adapter in the spellings of both layouts."""

from __future__ import annotations

from typing import Any

from ..config import VisionConfig
from ..errors import ConfigError
from .fields import Fields
from .window_fields import MAX_LAYERS

# What transformers' config has no key for; written beside the image token where a model differs.
_BREAK, _END = ("image_break_token_id", 12), ("image_end_token_id", 13)


def vision_of_params(fields: Fields) -> VisionConfig | None:
    """From `vision_encoder`, or the older `multimodal.vision_encoder_args`. Defaults are those of mistral-inference."""
    block = fields.block("vision_encoder")
    multimodal = fields.block("multimodal")
    if multimodal is not None:
        if multimodal.value("whisper_model_args") is not None:
            raise multimodal.error("whisper_model_args", "a text or vision model: audio models are not supported")
        block = block or multimodal.block("vision_encoder_args")
    if block is None:
        return None
    return VisionConfig(
        dim=block.integer("hidden_size"),
        n_layers=block.integer("num_hidden_layers", maximum=MAX_LAYERS),
        n_heads=block.integer("num_attention_heads"),
        hidden_dim=block.integer("intermediate_size"),
        patch_size=block.integer("patch_size"),
        image_size=block.integer("image_size" if block.has("image_size") else "max_image_size"),
        n_channels=block.integer("num_channels", 3),
        rope_theta=block.number("rope_theta", 1e4, minimum=1.0),
        patch_merge=block.choice("mm_projector_id", ("patch_merge", ""), "") == "patch_merge",
        spatial_merge_size=block.integer("spatial_merge_size", 1),
        pre_projector_norm=block.boolean("add_pre_mm_projector_layer_norm", False),
        adapter_bias=block.boolean("adapter_bias", True),
        image_token=block.integer("image_token_id", 10, minimum=0),
        image_break_token=block.integer("image_break_token_id", 12, minimum=-1),
        image_end_token=block.integer("image_end_token_id", 13, minimum=-1),
    )


def params_of_vision(vision: VisionConfig) -> dict[str, Any]:
    """The block `vision_encoder` of params.json."""
    return {
        "hidden_size": vision.dim,
        "num_channels": vision.n_channels,
        "image_size": vision.image_size,
        "max_image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "intermediate_size": vision.hidden_dim,
        "num_hidden_layers": vision.n_layers,
        "num_attention_heads": vision.n_heads,
        "rope_theta": vision.rope_theta,
        "image_token_id": vision.image_token,
        "image_break_token_id": vision.image_break_token,
        "image_end_token_id": vision.image_end_token,
        "adapter_bias": vision.adapter_bias,
        "spatial_merge_size": vision.spatial_merge_size,
        "add_pre_mm_projector_layer_norm": vision.pre_projector_norm,
        "mm_projector_id": "patch_merge" if vision.patch_merge else "",
    }


def vision_of_hf(fields: Fields) -> VisionConfig:
    """From the outer keys and `vision_config` of a Mistral3 config.json. Defaults are those of its classes."""
    block = fields.required_block("vision_config")
    block.choice("model_type", ("pixtral",), "pixtral")
    block.choice("hidden_act", ("silu",))
    fields.choice("projector_hidden_act", ("gelu",), "gelu")
    if fields.value("vision_feature_layer") not in (None, -1, [-1]):
        raise fields.error("vision_feature_layer", "-1, the last layer")
    return VisionConfig(
        dim=block.integer("hidden_size", 1024),
        n_layers=block.integer("num_hidden_layers", 24, maximum=MAX_LAYERS),
        n_heads=block.integer("num_attention_heads", 16),
        hidden_dim=block.integer("intermediate_size", 4096),
        patch_size=block.integer("patch_size", 16),
        image_size=block.integer("image_size", 1024),
        n_channels=block.integer("num_channels", 3),
        rope_theta=_theta_of_hf(block),
        patch_merge=True,
        spatial_merge_size=fields.integer("spatial_merge_size", 2),
        pre_projector_norm=True,
        adapter_bias=fields.boolean("multimodal_projector_bias", False),
        image_token=fields.integer("image_token_index" if fields.has("image_token_index") else "image_token_id", 10,
                                   minimum=0),
        image_break_token=fields.integer(*_BREAK, minimum=-1),
        image_end_token=fields.integer(*_END, minimum=-1),
    )  # fmt: skip


def _theta_of_hf(block: Fields) -> float:
    rope = block.block("rope_parameters")
    given = [owner.optional_number("rope_theta", minimum=1.0) for owner in (rope, block) if owner is not None]
    return next((theta for theta in given if theta is not None), 1e4)


def hf_of_vision(vision: VisionConfig) -> dict[str, Any]:
    """The outer keys of a Mistral3 config.json that describe images, `vision_config` among them."""
    if not (vision.patch_merge and vision.pre_projector_norm):
        raise ConfigError(
            "a vision adapter without patch merger and norm (as in Pixtral 12B) has no spelling in a Mistral3 "
            "config.json: write params.json instead"
        )
    found = {_BREAK: vision.image_break_token, _END: vision.image_end_token}
    return {
        "image_token_index": vision.image_token,
        "spatial_merge_size": vision.spatial_merge_size,
        "multimodal_projector_bias": vision.adapter_bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        **{key: token for (key, usual), token in found.items() if token != usual},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": vision.dim,
            "intermediate_size": vision.hidden_dim,
            "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads,
            "head_dim": vision.head_dim,
            "num_channels": vision.n_channels,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        },
    }
