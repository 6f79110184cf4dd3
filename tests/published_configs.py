"""The published params.json and config.json files as Python dicts, by model name. Holds no tests."""

from typing import Any

_7B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
}

_VISION: dict[str, Any] = {
    "image_token_id": 10,
    "image_break_token_id": 12,
    "image_end_token_id": 13,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mm_projector_id": "patch_merge",
    "spatial_merge_size": 2,
    "hidden_size": 1024,
    "num_channels": 3,
    "image_size": 1540,
    "max_image_size": 1540,
    "patch_size": 14,
    "rope_theta": 10000.0,
    "add_pre_mm_projector_layer_norm": True,
    "adapter_bias": False,
}


def _ministral_3(dim: int, n_layers: int, hidden_dim: int, theta: float, *, tied: bool, fp8: bool) -> dict[str, Any]:
    document = {
        **_7B,
        "dim": dim,
        "n_layers": n_layers,
        "hidden_dim": hidden_dim,
        "rope_theta": theta,
        "vocab_size": 131072,
        "tied_embeddings": tied,
        "max_position_embeddings": 262144,
        "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
        "q_lora_rank": None,
        "qk_rope_head_dim": None,
        "qk_nope_head_dim": None,
        "kv_lora_rank": None,
        "v_head_dim": None,
        "vision_encoder": dict(_VISION),
        "yarn": {
            "original_max_position_embeddings": 16384,
            "factor": 16,
            "apply_scale": False,
            "beta": 32,
            "alpha": 1,
        },
    }
    return document | ({"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}} if fp8 else {})


def compressed_tensors(
    kind: str, weights: dict[str, Any], activations: dict[str, Any] | None, ignore: list[str]
) -> dict[str, Any]:
    """A quantization_config of llm-compressor with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


FP8_BLOCK = compressed_tensors(
    "float-quantized",
    {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True,
     "dynamic": False},
    {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": True},
    ["re:.*gate$", "re:.*q_a_proj", "re:.*kv_a_proj_with_mqa", "lm_head"],
)  # fmt: skip
NVFP4 = compressed_tensors(
    "nvfp4-pack-quantized",
    {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
     "dynamic": False},
    {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
     "dynamic": "local"},
    ["re:.*self_attn.*", "re:.*attention.*", "lm_head"],
)  # fmt: skip
INT8 = compressed_tensors(
    "int-quantized",
    {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False,
     "observer": "minmax"},
    {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
    ["lm_head"],
)  # fmt: skip

_LARGE_3: dict[str, Any] = {
    "dim": 7168,
    "n_layers": 61,
    "head_dim": 192,
    "hidden_dim": 16384,
    "n_heads": 128,
    "n_kv_heads": 128,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "vocab_size": 131072,
    "tied_embeddings": False,
    "max_position_embeddings": 294912,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "moe": {
        "expert_parallel": 1,
        "expert_model_parallel": 1,
        "route_every_n": 1,
        "first_k_dense_replace": 3,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0,
        "expert_hidden_dim": 4096,
        "num_shared_experts": 1,
    },
    "yarn": {"original_max_position_embeddings": 8192, "factor": 36, "apply_scale": False, "beta": 32, "alpha": 1},
    "vision_encoder": {
        **_VISION,
        "hidden_size": 1664,
        "num_hidden_layers": 48,
        "intermediate_size": 8192,
    },
}

# What the catalog's entry of that name is in mistral layout.
PARAMS: dict[str, dict[str, Any]] = {
    "mistral-7b-v0.1": {**_7B, "sliding_window": 4096},
    "mistral-7b-v0.2": {**_7B, "rope_theta": 1000000.0},
    "mistral-7b-v0.3": {**_7B, "vocab_size": 32768, "rope_theta": 1000000.0},
    "mixtral-8x7b-v0.1": {**_7B, "rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
    "mixtral-8x22b-v0.3": {
        **_7B,
        "dim": 6144,
        "n_layers": 56,
        "hidden_dim": 16384,
        "n_heads": 48,
        "vocab_size": 32768,
        "rope_theta": 1e6,
        "moe": {"num_experts_per_tok": 2, "num_experts": 8},
    },
    "ministral-8b-instruct-2410": {
        **_7B,
        "n_layers": 36,
        "hidden_dim": 12288,
        "vocab_size": 131072,
        "rope_theta": 100000000.0,
        "sliding_window": [None, 32768, 32768, 32768],
    },
    "ministral-3-3b-base-2512": _ministral_3(3072, 26, 9216, 1e6, tied=True, fp8=False),
    "ministral-3-3b-instruct-2512": _ministral_3(3072, 26, 9216, 1e6, tied=True, fp8=True),
    "ministral-3-8b-instruct-2512": _ministral_3(4096, 34, 14336, 1e6, tied=False, fp8=True),
    "ministral-3-14b-reasoning-2512": _ministral_3(5120, 40, 16384, 1e9, tied=False, fp8=False),
    "mistral-large-3-675b-base-2512": _LARGE_3,
    "mistral-large-3-675b-instruct-2512": {**_LARGE_3, "quantization_config": FP8_BLOCK},
}

_HF_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

# Of Ministral 8B, with a window on every layer: not what its catalog entry says.
HF_MINISTRAL_8B: dict[str, Any] = {
    **_HF_7B,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "rope_theta": 100000000.0,
    "sliding_window": 32768,
    "vocab_size": 131072,
    "transformers_version": "4.46.0.dev0",
}

_HF_ROPE_3: dict[str, Any] = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _hf_ministral_3(dim: int, n_layers: int, hidden_dim: int, theta: float) -> dict[str, Any]:
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": dim,
            "initializer_range": 0.02,
            "intermediate_size": hidden_dim,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": n_layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {**_HF_ROPE_3, "rope_theta": theta},
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 131072,
        },
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "model_type": "pixtral",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "transformers_version": "5.0.0.dev0",
    }


HF_FP8: dict[str, Any] = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}

# What the catalog's entry of that name is in HF layout.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral-7b-v0.1": _HF_7B,
    "mistral-7b-instruct-v0.2": {**_HF_7B, "rope_theta": 1e6, "sliding_window": None},
    "mistral-7b-v0.3": {**_HF_7B, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
    "mixtral-8x7b-instruct-v0.1": {
        **_HF_7B,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "ministral-3-3b-base-2512": _hf_ministral_3(3072, 26, 9216, 1e6),
    "ministral-3-3b-instruct-2512": {**_hf_ministral_3(3072, 26, 9216, 1e6), "quantization_config": HF_FP8},
    "ministral-3-8b-base-2512": {**_hf_ministral_3(4096, 34, 14336, 1e6), "tie_word_embeddings": False},
    "ministral-3-14b-base-2512": {**_hf_ministral_3(5120, 40, 16384, 1e9), "tie_word_embeddings": False},
    "mistral-small-4-119b-instruct-2603": {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "kv_lora_rank": 256,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 36,
        "num_key_value_heads": 32,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_parameters": {
            **_HF_ROPE_3,
            "rope_theta": 10000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "partial_rotary_factor": 0.5,
        },
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
        "vocab_size": 131072,
    },
}

# The least that a file can say, of small models that were never published.
SMALL_PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 8,
    "hidden_dim": 96,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 128,
}
SMALL_CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "sliding_window": None,
}
